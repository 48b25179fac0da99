"""What is collected of a model over a text: importance matrices and second moments of inputs, by the forward pass or by
llama-imatrix, and what that takes, estimated before it starts. May import what lies below lab; offers
make_imatrix.make_imatrix and estimate."""
