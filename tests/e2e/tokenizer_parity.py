#!/usr/bin/env python3
"""Compares our tokenizer with Hugging Face's `tokenizers` on several megabytes of mixed text.

    tests/e2e/tokenizer_parity.py --tool BUILD/tests/unit/tokenize_file --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        [--qwen qwen.tiktoken] [--megabytes 6] [--speed]

Needs the Python packages tokenizers and gguf. qwen.tiktoken lies in the PyPI package dashscope (resources/). The text is
made from what every machine has (Python's library as code and English, gettext catalogues as real text in many
languages, where installed) and from seeded random characters: all scripts, combining marks, emoji sequences, white
space of every kind, look-alikes of special tokens. Each tokenizer encodes every part twice, with special tokens
recognised in the text and without. Exit status 0 when all ids are equal.
"""
import argparse
import base64
import gettext
import glob
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LOOK_ALIKES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|", "|im_end|>", "<|im_end |>", "<|IM_END|>",
               "<think>", "</think>", "<think", "<tool_call>", "<|im_<|im_end|>end|>", "<<|im_end|>>", " <|im_end|>\n",
               "<|begin_of_text|>", "[KEEP]", " [KEEP] ", "a[KEEP]b", "[WORD]", "x[WORD]", " [WORD].", "\u00e9[NFC\u00c9]",
               "e\u0301[NFCE\u0301]", "<repo_name>", "<reponame>"]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog; it's 10:45, they've 1,234.56 and I'll say we're DON'T'S.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Årsmøte på fjäll. Straße ſ'ſ İstanbul ıŞIK",
    "Съешь же ещё этих мягких французских булок, да выпей чаю № 5.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "敏捷的棕色狐狸跳過了懶狗，價格是１２３元。", "いろはにほへと ちりぬるを カ\u3099キ\u3099 ｶﾞｷﾞ ー", "키스의 고유조건은 입술끼리 만나야 \u1100\u1161\u11a8 한다.",
    "نصٌّ حكيمٌ له سرٌّ قاطعٌ وذو شأنٍ عظيمٍ ١٢٣٤", "דג סקרן שט בים מאוכזב שָׁלוֹם", "ऋषियों को सताने वाले दुष्ट राक्षसों क्षत्रिय १२३ क\u093c",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓", "நீரில் தமிழ்", "ქართული ენა", "Հայերեն լեզու", "አማርኛ ፩፪", "မြန်မာ", "ខ្មែរ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☕️ 1️⃣ 🤷🏻‍♀️", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β ⟹ 𝔄 𝟙 ½ ² ① Ⅻ Å Ω Å",
    "for (int i = 0; i < n; ++i) {\n\tprintf(\"%d\\n\", a[i]);\n}\n", "SELECT * FROM t WHERE a='b''c' -- don't\r\n",
    "  def f(x):\n        return x  # \u00a0nbsp\u2003em\u3000wide\u180emongolian\u200bzero\ufeff\n\n\n",
    "https://example.org/a?b=c&d=%20#e user@example.com C:\\dir\\file", "a\u0301\u0323\u0300 q\u0307\u0323 \u1e9b\u0323 \uac01\u11a8 \u0344 \u2126",
]
# Common combining marks often, all the others too: normalisation sorts and composes them.
MARKS = [chr(c) for c in (0x300, 0x301, 0x308, 0x323, 0x327, 0x93c, 0x3099, 0x1161, 0x11a8, 0x653)] * 90 + \
    [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u180e\u2000\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"


def natural_parts(limit):
    """Real text: Python sources, then message catalogues of other languages."""
    parts, size = [], 0
    stdlib = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(os.path.join(stdlib, "*.py")) + glob.glob(os.path.join(stdlib, "json", "*.py"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            parts.append(file.read())
        size += len(parts[-1])
        if size > limit // 2:
            break
    size = 0
    for path in sorted(glob.glob("/usr/share/locale/*/LC_MESSAGES/*.mo"))[::7]:
        try:
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, ValueError, LookupError):  # not every catalogue is well formed
            continue
        text = "\n".join(value for value in catalogue.values() if isinstance(value, str))
        parts.append(text[:20000])
        size += len(parts[-1].encode())
        if size > limit // 3:
            break
    return parts


def random_part(rng, assigned, size):
    """About `size` characters, switching between kinds every few."""
    out = []
    count = 0
    while count < size:
        kind = rng.randrange(9)
        if kind == 0:
            piece = rng.choice(SENTENCES)
        elif kind == 1:
            piece = "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 9)))
        elif kind == 2:
            piece = rng.choice(LOOK_ALIKES)
        elif kind == 3:
            base = rng.randrange(0x110000)
            piece = "".join(chr(c) for c in (base + rng.randrange(64) for _ in range(12))
                            if c < 0x110000 and not 0xd800 <= c < 0xe000 and c)
        elif kind == 4:
            piece = "".join(rng.choice(assigned) for _ in range(rng.randrange(1, 12)))
        elif kind == 5:
            piece = rng.choice("aeounAEOUक가か\u1100") + "".join(
                rng.choice(MARKS) for _ in range(rng.randrange(1, 5)))
        elif kind == 6:
            piece = rng.choice(["", " ", "\n"]) + "".join(rng.choice("'stdmrevlLSDTé ſ\"") for _ in range(rng.randrange(2, 8)))
        elif kind == 7:
            piece = "".join(rng.choice("0123456789.,१٣５½") for _ in range(rng.randrange(1, 10)))
        else:
            piece = rng.choice("ab!= -_*\u3042") * rng.randrange(1, 200)
        out.append(piece)
        count += len(piece)
    return "".join(out)


def corpus(megabytes, seed=1):
    rng = random.Random(seed)
    assigned = [chr(c) for c in range(1, 0x110000)
                if not 0xd800 <= c < 0xe000 and unicodedata.category(chr(c)) not in ("Cn", "Co")]
    wanted = int(megabytes * 1e6)
    text = "\n".join(natural_parts(wanted))
    parts = [text[i:i + 700000] for i in range(0, len(text), 700000)]
    size = len(text.encode())
    # Every code point once between letters, so that no class of characters is left to chance.
    for step in (range(0, 0x30000), range(0x30000, 0x110000, 17)):
        parts.append("".join("x%c " % c for c in step if not 0xd800 <= c < 0xe000))
    while size < wanted:
        parts.append(random_part(rng, assigned, 250000))
        size += len(parts[-1].encode())
    return parts


def special(text, **flags):
    return AddedToken(text, normalized=flags.pop("normalized", False), special=flags.pop("special", True), **flags)


def read_gguf(path):
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    return tokens, types, merges


def read_tiktoken(path):
    """Ranks of byte strings to a vocabulary in the byte alphabet and the merges that lead to each token."""
    keep = list(range(0x21, 0x7f)) + list(range(0xa1, 0xad)) + list(range(0xae, 0x100))
    alphabet = {b: chr(b) for b in keep}
    for n, b in enumerate(b for b in range(256) if b not in keep):
        alphabet[b] = chr(0x100 + n)
    show = lambda token: "".join(alphabet[b] for b in token)
    ranks = {}
    with open(path, "rb") as file:
        for line in file:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
            if ranks.get(parts[best] + parts[best + 1], 1 << 60) >= rank:
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((show(parts[0]), show(parts[1])))
    return {show(token): rank for token, rank in ranks.items()}, merges


def make(vocab, merges, pre_tokenizer, added, normalizer=None, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(added)
    return tokenizer


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


def tokenizers_to_compare(args):
    """Yields name, our argument (None: the tokenizer.json of the reference), reference."""
    tokens, types, merges = read_gguf(args.gguf)
    vocab = {t: i for i, t in enumerate(tokens)}
    chatml = [special(t) for t, kind in zip(tokens, types) if kind == 3]
    smollm = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])
    yield "smollm2 (gguf)", args.gguf, make(vocab, merges, smollm, chatml)
    yield "smollm2", None, make(vocab, merges, smollm, chatml)
    yield "gpt2 pattern", None, make(vocab, merges, byte_level(True), chatml)
    flags = chatml + [special("[KEEP]", lstrip=True, rstrip=True), special("[WORD]", single_word=True, special=False),
                      special("[NFC\u00c9]", normalized=True, special=False)]
    llama = make(vocab, merges, split(CL100K % "{1,3}"), flags, ignore_merges=True)
    llama.add_tokens([special("<|begin_of_text|>")])
    bos = llama.token_to_id("<|begin_of_text|>")
    llama.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                         special_tokens=[("<|begin_of_text|>", bos)])
    yield "llama3 pattern", None, llama
    yield "qwen2 pattern, flags", None, make(vocab, merges, split(CL100K % ""), flags, normalizers.NFC())
    if args.qwen:
        vocab, merges = read_tiktoken(args.qwen)
        added = [special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        added += [special(t, special=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")]
        yield "qwen2", None, make(vocab, merges, split(CL100K % ""), added, normalizers.NFC())


def ours(args, tokenizer, path, plain, repeat=0):
    command = [args.tool] + (["--plain"] if plain else []) + (["--repeat", str(repeat)] if repeat else [])
    done = subprocess.run(command + [tokenizer, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit("%s: %s" % (tokenizer, done.stderr.decode()))
    return memoryview(done.stdout).cast("i").tolist(), done.stderr.decode().strip()


def first_difference(reference, a, b):
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    low = max(0, at - 4)
    name = lambda ids: [(i, reference.id_to_token(i)) for i in ids[low:at + 6]]
    return "at token %d\n  theirs %s\n  ours   %s" % (at, name(a), name(b))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--qwen")
    parser.add_argument("--megabytes", type=float, default=6)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        parts = corpus(args.megabytes)
        paths = []
        for i, part in enumerate(parts):
            paths.append(os.path.join(scratch, "part%d.txt" % i))
            with open(paths[-1], "w", encoding="utf-8", newline="") as file:
                file.write(part)
        size = sum(len(part.encode()) for part in parts)
        print("%d parts, %.2f MB" % (len(parts), size / 1e6))
        for name, argument, reference in tokenizers_to_compare(args):
            if argument is None:
                argument = os.path.join(scratch, "tokenizer.json")
                reference.save(argument)
            count = wrong = 0
            for plain in (False, True):
                reference.encode_special_tokens = plain
                for part, path in zip(parts, paths):
                    theirs = reference.encode(part, add_special_tokens=False).ids
                    mine, _ = ours(args, argument, path, plain)
                    count += len(theirs)
                    if theirs != mine:
                        wrong += 1
                        print("%s%s: %s differs %s" % (name, " (plain)" if plain else "", os.path.basename(path),
                                                       first_difference(reference, theirs, mine)))
            failed += wrong
            print("%-22s %9d tokens in %.2f MB x 2: %s" % (name, count, size / 1e6,
                                                         "%d parts differ" % wrong if wrong else "identical"))
            if args.speed:
                for path in (paths[0], paths[-1]):
                    print("    " + ours(args, argument, path, False, repeat=5)[1])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
