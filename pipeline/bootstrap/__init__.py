"""`make bootstrap`: makes the embedded default, a tokenizer, a tiny Gemma-2-architecture model and base transcoders."""
