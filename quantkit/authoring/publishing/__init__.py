"""What is put on the Hub: the files that belong together, and the model card that says what they are. Offers parcel,
evaluation and card to the command line; sending them is quantkit.hub.sending."""
