"""Documents, tokens and the order of samples. Only the loader needs torch.

- from raw files: `documents` and `corpus` (what they are), `hub` (fetched), `filters`, `chat` (what one is);
  `extensions` loads a user's own
- to tokens: `tokenizer`; `tokens` in a `cache`, in `shards` of the user's own, or in a `prepared` corpus;
  `rows` packs chats
- to micro-batches: `order` says which sample is where, `loader` brings them
- `harness prepare`: `recipe`, then `preparation`, which takes a `snapshot`, does `parts` in `processes` and
  ends with a `description`
"""
