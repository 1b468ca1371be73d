"""Token ids of a plain text, for the example perplexity.   python perplexity_ids.py TOKENIZER.json TEXT OUT.json [TOKENS] [WINDOW]

No token goes in front of a piece: the first token of each is not scored.
"""
import json, os, sys
from tokenizers import Tokenizer

tokenizer, text, out = sys.argv[1:4]
count, window = (int(word) for word in (sys.argv[4:] + ["4096", "256"])[:2])
with open(text, encoding="utf-8") as file:
    ids = Tokenizer.from_file(tokenizer).encode(file.read(), add_special_tokens=False).ids[:count]
if len(ids) < count:
    sys.exit(f"{text} has only {len(ids)} tokens")
with open(out, "w") as file:
    json.dump({"window": window, "begin_token": False, "text_file": os.path.basename(text), "token_ids": ids}, file, separators=(",", ":"))
    file.write("\n")
