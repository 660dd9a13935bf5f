#!/usr/bin/env python3
"""Writes tokenizer_cases.json: small tokenizers trained here, and what Hugging Face's `tokenizers` makes of odd texts.

    tests/golden/make_tokenizer_cases.py [--output FILE]

Each group holds a tokenizer.json of about 500 tokens and cases [text, ids, ids with special tokens unrecognised].
Needs the Python package tokenizers. The large comparison is tests/e2e/tokenizer_parity.py.
"""
import argparse
import json
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then there are others that they have seen; it's what we'll do.",
    "It's the first time that I've been there. They're not here, you'd say, but we can't be sure: 1234 and 56.78!",
    "for (int i = 0; i < count; i++) {\n    total += values[i];\n}\nreturn total;\n",
    "naïve café Überraschung déjà vu — “quoted” … привет мир 你好世界 こんにちは नमस्ते العربية 안녕하세요 👍🏽 🙂",
    "aaaa aaaaaaaa        bbbb\n\n\n\t\ttabs and spaces   here",
]
TEXTS = [
    "", " ", "a", "  ", "\n", "hello world", "Hello, World!", "the the the  the", "it's IT'S It'S 'S 's 'ſ 'T don't we'LL y'all've",
    "1234567 12 3 ½²٣५१２ x1y22z333", "  leading", "trailing  ", "a  b   c    d", "a\nb\r\nc\r\n\r\n d \n e\n \n", "\t\t\tx \t\n y",
    "x\u00a0y\u2003z\u3000w\u180ev\u200bu\ufefft\u0085s\x0b\x0cr\u2028q\u202fp\u205fo\u1680n", " \u00a0 \u2003x\u3000\u3000",
    "naïve café — “quoted”…", "e\u0301 a\u0323\u0302 \u1e9b\u0323 Å Å q\u0307\u0323", "\u1100\u1161\u11a8 각 \uac00\u11a8", "か\u3099 が",
    "नमस्ते क\u093c क़", "العَرَبِيَّة", "שָׁלוֹם", "你好，世界。", "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪1️⃣", "𝔘𝔫𝔦 𐍈 \U00011de0\U0001e4f0 \U00031350 \u1c89",
    "\u0378\ue000\U0010ffff", "a" * 47, "a" * 48, "a" * 49, "a" * 50, "ab" * 60, " " * 100 + "x", "the" * 40, "\u0301" * 60, "=" * 70,
    "<|im_start|>user\nHi<|im_end|>", "<|im_end|><|im_end|>", "<|im_<|im_end|>end|>", "<|im_end|", "<|IM_END|>", "x<|im_end|>y",
    " <|im_end|> ", "<think>a</think>b", "<think", "[KEEP]", "a  [KEEP]  b", "a\n[KEEP]\u3000[KEEP]\nb", "[WORD]", "a[WORD]", "[WORD]_",
    " [WORD].", "é[WORD]é", "[É]", "[E\u0301]", "x[E\u0301]y", "<|long|><|long|>er|>", "<|long|>er|>", "<|long", "\x00a\x00", "\x01\x7f",
    "snake_case camelCase http://x.y/z?a=b&c=d", "\\n \\t \" ' `", "don't\u2019t", "A\u0130\u0131\u00df\u1e9e", "\ud7a3\u3131",
]
HOSTILE_PREFIX = "<|im_start|> [KEEP] "


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


def train(pre_tokenizer, size=460, alphabet=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def added(text, **flags):
    return AddedToken(text, special=flags.pop("special", True), normalized=flags.pop("normalized", False), **flags)


def with_model(tokenizer, **changes):
    data = json.loads(tokenizer.to_str())
    data["model"].update(changes)
    return Tokenizer.from_str(json.dumps(data))


def legacy_merges(text):
    data = json.loads(text)
    data["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    return json.dumps(data)


def groups():
    smollm = train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]), alphabet=[])
    yield "smollm, missing bytes", smollm, None
    yield "unknown token", with_model(smollm, unk_token="<|endoftext|>"), None
    yield "unknown token, fused", with_model(smollm, unk_token="<|endoftext|>", fuse_unk=True), None
    yield "gpt2, merges as strings", train(byte_level(True)), legacy_merges
    yield "gpt2, as a split", train(split(GPT2)), None
    llama = train(split(CL100K % "{1,3}"))
    llama.add_tokens([added("<|begin_of_text|>")])
    llama.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", llama.token_to_id("<|begin_of_text|>"))])
    yield "llama3, ignore_merges", with_model(llama, ignore_merges=True), None
    qwen = train(split(CL100K % ""))
    qwen.normalizer = normalizers.NFC()
    qwen.add_tokens([added("<think>", special=False), added("</think>", special=False), added("[KEEP]", lstrip=True, rstrip=True),
                     added("[WORD]", single_word=True, special=False), added("[\u00c9]", normalized=True, special=False),
                     added("<|long|>"), added("<|long|>er|>")])
    yield "qwen2, nfc and flags", qwen, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer_cases.json"))
    args = parser.parse_args()
    out = []
    for name, tokenizer, rewrite in groups():
        text = tokenizer.to_str()
        # U+0000 cannot stand in our JSON; the test puts it in for U+241A.
        texts = [t.replace("\x00", "\u241a") for t in TEXTS] + [HOSTILE_PREFIX + t.replace("\x00", "\u241a") + HOSTILE_PREFIX for t in TEXTS]
        cases = []
        for shown in texts:
            both = []
            for plain in (False, True):
                tokenizer.encode_special_tokens = plain
                both.append(tokenizer.encode(shown.replace("\u241a", "\x00"), add_special_tokens=False).ids)
            cases.append([shown] + (both if both[0] != both[1] else both[:1]))
        out.append({"name": name, "tokenizer": json.loads(rewrite(text) if rewrite else text), "cases": cases})
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump({"groups": out}, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
