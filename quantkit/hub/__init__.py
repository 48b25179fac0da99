"""The Hugging Face Hub: addresses, repositories at one commit, bytes by range, files checked by their hashes.

huggingface_hub does the transport, with its endpoint, token, cache and offline mode; here is what it lacks: to go
on after what passes (429, 5xx, bodies cut short), to check what came, and errors in a sentence. It is imported when
something is fetched, not before.
"""
