"""Run by llama.cpp's own Python: logits and token ids of GGUF files, for the tests beside it.

python llamacpp_logits.py FILE TOKENS.json OUT.npz: logits (n, vocabulary) of the ids, and those of the texts' ids.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

file, asked, out = sys.argv[1:]
wanted = json.loads(Path(asked).read_text())
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
model = llama_cpp.Llama(file, n_ctx=len(wanted["ids"]) + 8, logits_all=True, verbose=False, flash_attn=False)
model.eval(wanted["ids"])
found = {"logits": np.array(model.scores[: len(wanted["ids"])])}
for number, text in enumerate(wanted["texts"]):
    found[f"text{number}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=False), np.int64)
np.savez(out, **found)
