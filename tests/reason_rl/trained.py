"""Tokenizers of the types that checkpoints have, trained here on a page of text, and their folders."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

PAGE = [f"Question {i}: Tom has {i} red apples and buys {3 * i} more; how many apples does he have? Answer: {4 * i}. Größe, "
        f"façade, naïve 数学 🙂 <think>{i}+{3 * i}={4 * i}</think><answer>{4 * i}</answer>\n" for i in range(120)]
TEXTS = ["Tom has 3 apples.", " leading and  double spaces ", "line\n\nline\ttab", "数学 and 🙂🙃 and é", "", "x", "unseen: ₪ĸ𝄞",
         "<think>1+1=2</think>\n<answer>2</answer>"]
END = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>", "<|start_header_id|>",
       "<|end_header_id|>", "<|begin|>")
SENTENCEPIECE = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@lru_cache
def byte_level() -> str:
    """As in Qwen, Llama 3, OLMoE and GLM: BPE on bytes; tags such as <think> are several tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(PAGE, trainers.BpeTrainer(vocab_size=700, special_tokens=[*END], initial_alphabet=alphabet,
                                                        show_progress=False))
    return inner.to_str()


@lru_cache
def byte_fallback() -> str:
    """As in Llama 2 and Mixtral: BPE on characters, spaces as ▁, unknown characters as bytes, a BOS before each text."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.train_from_iterator(PAGE, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SENTENCEPIECE], show_progress=False))
    model = json.loads(inner.to_str())["model"]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in SENTENCEPIECE]
    vocab = {piece: i for i, piece in enumerate([*SENTENCEPIECE, *BYTES, *pieces])}
    inner.model = models.BPE(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]], unk_token="<unk>", fuse_unk=True,
                             byte_fallback=True)
    return _sentencepiece(inner)


@lru_cache
def unigram() -> str:
    """As in T5's line of SentencePiece: a unigram model, unknown characters as bytes."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator(PAGE, trainers.UnigramTrainer(vocab_size=300, special_tokens=[*SENTENCEPIECE], unk_token="<unk>",
                                                            show_progress=False))
    learnt = [(piece, score) for piece, score in json.loads(inner.to_str())["model"]["vocab"] if piece not in SENTENCEPIECE]
    pieces = [*((piece, 0.0) for piece in SENTENCEPIECE), *((byte, -20.0) for byte in BYTES), *learnt]
    inner.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    return _sentencepiece(inner)


def _sentencepiece(inner: tokenizers.Tokenizer) -> str:
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens([*SENTENCEPIECE])
    return inner.to_str()


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}


def folder_of(folder: Path, kind: str = "byte_level", generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A checkpoint's folder without weights. config: keys of tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(KINDS[kind](), encoding="utf-8")
    named = {"eos_token": "<|im_end|>"} if kind == "byte_level" else {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
