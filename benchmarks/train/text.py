"""Text that every machine has: the sources of Python's standard library and of the installed packages."""

import encodings
import functools
import hashlib
import importlib.metadata
import os
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

BYTES = 256  # vocabulary of a text of bytes
TEST_SHARE = 0.05
MOST_BYTES = 48 * 10**6
INSTALLED = ("site-packages", "dist-packages")  # folders in that of the standard library


class Text(NamedTuple):
    """The tokens of the training and the test text."""

    train: np.ndarray
    test: np.ndarray
    facts: dict  # sizes, checksum, tokeniser

    @property
    def entropy(self) -> float:
        """Entropy of the token frequencies in nats: the loss of a model that knows only these."""
        count = np.bincount(self.train)
        share = count[count > 0] / len(self.train)
        return float(-(share * np.log(share)).sum())


def standard_library() -> list[Path]:
    """Return its source files, without packages that are installed there."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [x for x in folder.rglob("*.py") if not set(INSTALLED) & set(x.relative_to(folder).parts)]


def packages() -> list[Path]:
    """Return the source files of the installed packages."""
    return list(Path(sysconfig.get_path("purelib")).rglob("*.py"))


def codecs() -> list[Path]:
    """Return the source files of the package `encodings`: mostly tables, which a small model learns fast."""
    return list(Path(encodings.__file__).parent.rglob("*.py"))


def read(*sources: Callable[[], list[Path]], seed: int = 0, most: int = MOST_BYTES) -> tuple[list[bytes], list[bytes]]:
    """Return the training and the test files, in an order that depends only on ``seed`` and on the contents.

    Equal files are taken once. Sources are read one after the other, up to ``most`` bytes.
    """
    chosen: dict[bytes, bytes] = {}
    total = 0
    for source in sources:
        found = {}
        for path in filter(Path.is_file, source()):
            contents = path.read_bytes()
            found[hashlib.sha256(contents).digest()] = contents
        order = sorted(found)
        random.Random(seed).shuffle(order)
        for digest in order:
            size = len(found[digest])
            if size and digest not in chosen and total + size <= most:
                chosen[digest] = found[digest]
                total += size
    files = [chosen[digest] for digest in sorted(chosen)]
    random.Random(seed).shuffle(files)
    number = max(1, round(TEST_SHARE * len(files)))
    return files[number:], files[:number]


def checksum(train: list[bytes], test: list[bytes]) -> str:
    """Return the SHA-256 of both texts."""
    digest = hashlib.sha256()
    for files in (train, test):
        for contents in files:
            digest.update(len(contents).to_bytes(8, "little") + contents)
    return digest.hexdigest()


def by_bytes(train: list[bytes], test: list[bytes]) -> Text:
    """Return a token for each byte."""
    to_array = lambda files: np.frombuffer(b"".join(files), np.uint8)
    return Text(to_array(train), to_array(test), describe(train, test) | {"tokeniser": "bytes"})


def by_pairs(train: list[bytes], test: list[bytes], vocabulary: int) -> Text:
    """Return the tokens of a byte-pair encoding (Sennrich et al. 2016), which is trained on ``train``, from a cache."""
    facts = describe(train, test)
    facts["tokeniser"] = f"byte-level BPE of {vocabulary:,}, tokenizers {importlib.metadata.version('tokenizers')}"
    key = hashlib.sha256(repr((facts, vocabulary)).encode()).hexdigest()[:16]
    kept = cache() / f"tokens-{key}.npz"
    if not kept.exists():
        encode = train_tokeniser(train, vocabulary)
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(new, train=encode(train), test=encode(test))
        new.replace(kept)
    with np.load(kept) as tokens:
        return Text(tokens["train"], tokens["test"], facts)


def train_tokeniser(train: list[bytes], vocabulary: int) -> Callable[[list[bytes]], np.ndarray]:
    """Return a function from files to token numbers. An end mark follows each file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    decode = lambda files: [x.decode("utf-8", "replace") for x in files]
    tokenizer.train_from_iterator(decode(train), trainer)
    last = [tokenizer.token_to_id(end)]

    def encode(files):
        encoded = tokenizer.encode_batch_fast(decode(files), add_special_tokens=False)
        return np.concatenate([np.array(x.ids + last, np.uint16) for x in encoded])

    return encode


def describe(train: list[bytes], test: list[bytes]) -> dict:
    """Return the sizes and the checksum."""
    size = lambda files: sum(map(len, files))
    return {
        "files": [len(train), len(test)],
        "bytes": [size(train), size(test)],
        "sha256": checksum(train, test),
    }


def cache() -> Path:
    """Return the folder of tokens and checkpoints."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jadam" / "train"


@functools.cache
def load(vocabulary: int) -> Text:
    """Return the bytes of `codecs` if ``vocabulary`` is `BYTES`, else the tokens of all sources."""
    if vocabulary == BYTES:
        return by_bytes(*read(codecs))
    return by_pairs(*read(standard_library, packages), vocabulary)
