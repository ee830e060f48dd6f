"""Makes the embedded default: a tokenizer, a tiny Gemma-2-architecture model and its base transcoders (`make bootstrap`)."""
