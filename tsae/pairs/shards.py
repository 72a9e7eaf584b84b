"""Pairs (x, t) that can be read at random: in memory, or on disk in shards.

A store is a folder: shards of bfloat16 activations (<number>.x) and int32 token ids (<number>.t), raw,
little-endian, and `manifest.json`, which says what they are and holds their checksums. A file is
written whole or not at all, the shards before the manifest that names them: a process may be killed
at any instant.
"""

import errno
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from tsae import store
from tsae.pairs.extract import NO_POSITION, Pair, activations, statistics

try:
    import fcntl
except ImportError:  # not a POSIX system: there two processes must not make one store at once
    fcntl = None

FORMAT = "tsae-activations"
# VERSION makes a store on disk old. Raise it by hand whenever the same rows and callables would give
# other bytes or another layout; the golden-digest test in tests/test_shards.py guards it.
VERSION = 1

HEAD = dict(d_model=int, dtype=str, identity=dict, made_of=dict, shards=list, complete=bool)
SHARD = dict(name=str, first_row=int, last_row=int, tokens=int, sha256_x=str, sha256_t=str)
LEFTOVER = re.compile(r"\.(\d+|manifest)-\w+\.(x|t|json)")  # a temporary file of store.replacing


class _Pairs:
    """Pairs that can be read at random, in parts x (m, d), t (m,)."""

    def __init__(self, parts: list[Pair]):
        self.parts, self.d_model = parts, parts[0][0].shape[1]
        self.ends = torch.tensor([len(t) for _, t in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def statistics(self, vocabulary: int) -> dict[str, torch.Tensor]:
        """The `Moments` of all pairs."""
        few = len(self.parts) < 20
        return statistics(tqdm(self.parts, "statistics", leave=False, disable=few), vocabulary)


class Memory(_Pairs):
    """Pairs x (m, d), t (m,) in memory, x in the dtype and on the device that it was given in."""

    def __init__(self, x: torch.Tensor, t: torch.Tensor):
        if len(x) != len(t) or not len(t):
            raise ValueError(f"{len(x)} activations and {len(t)} tokens were given: expected as many "
                             "of both, and some")
        super().__init__([(x, t)])

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64."""
        x, t = self.parts[0]
        index = index.to(x.device)
        return x[index].float(), t[index].long()


class Store(_Pairs):
    """Pairs on disk. `make` writes a store or goes on with one, `open` reads a complete one.

    Shards are mapped into memory, not read: what the system caches of them it can take back.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.identity = folder, manifest, manifest["identity"]
        super().__init__([_mapped(folder, line, manifest["d_model"]) for line in manifest["shards"]])

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """A complete store.

        Raises FileNotFoundError or ValueError that names what is missing, cut off or unknown.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        if not manifest["complete"]:
            raise ValueError(f"the store {folder} is not complete, it has {len(manifest['shards'])} "
                             "shards so far: run Store.make with the same arguments to go on")
        _check_faults(folder, manifest, checksums=False)
        return cls(folder, manifest)

    @classmethod
    def make(cls, folder: str | Path, rows: torch.Tensor, residuals: Callable, keep: Callable,
             d_model: int, identity: dict, tokens: int = 0, shard_tokens: int = 131072,
             max_gb: float = 50.0, batch_rows: int = 64, verify_gb: float = 4.0) -> "Store":
        """The store of the positions that are kept of rows (N, T), the first `tokens` of them (0: all).

        `residuals` and `keep`: see `activations`; they get `batch_rows` rows at a time. A shard ends
        with the pass that brings it to `shard_tokens` pairs. `identity` names the data (language
        model, layer). A store that is there already must be of the same arguments: missing shards are
        made, damaged ones made again, byte for byte. Sizes are always compared, checksums only where
        the store has at most `verify_gb`. One process writes, others wait. Raises ValueError for
        another identity, or a size over `max_gb` or the free space; OSError where the disk is full or
        may not be written. Whole shards stay.
        """
        if min(shard_tokens, batch_rows) < 1 or tokens < 0:
            raise ValueError(f"got {shard_tokens=}, {batch_rows=}, {tokens=}: the first two must be "
                             "positive")
        folder = Path(folder)
        digest = hashlib.sha256(rows.cpu().to(torch.int32).contiguous().numpy()).hexdigest()
        wanted = _empty_manifest(d_model, identity, made_of=dict(
            rows=digest, shape=list(rows.shape), tokens=tokens, shard_tokens=shard_tokens,
            batch_rows=batch_rows))
        plan = _plan(rows, keep, tokens, shard_tokens, batch_rows)
        size = sum(_bytes(shard, kind, d_model) for shard in plan for kind in "xt")
        checksums = size <= verify_gb * 1e9

        def pairs_of(shard: dict) -> Iterator[Pair]:
            order = torch.arange(shard["first_row"], shard["last_row"])
            return activations(rows, residuals, keep, batch_rows, order)

        manifest = _begun(folder, wanted, plan)
        if not manifest["complete"] or _faults(folder, manifest, checksums):
            _check_room(folder, plan, d_model, size, max_gb)
            with _locked(folder):
                manifest = _begun(folder, wanted, plan)  # another process may have written meanwhile
                _write_missing(folder, manifest, plan, pairs_of, checksums)
        return cls.open(folder)

    def verify(self) -> None:
        """Reads everything. Raises ValueError that names each file that has changed."""
        _check_faults(self.folder, self.manifest, checksums=True)

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64. Raises IndexError.

        The index is sorted, so that neighbours on disk are read one after the other; each shard fills
        its own slice of the result, which at last goes back into the order that was asked for.
        """
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"the store has pairs 0 to {len(self) - 1}, got {int(index.min())} to "
                             f"{int(index.max())}")
        index, order = index.cpu().sort()
        x = torch.empty(len(index), self.d_model, dtype=torch.bfloat16)
        t = torch.empty(len(index), dtype=torch.int32)
        ends, cuts = self.ends.tolist(), torch.searchsorted(index, self.ends).tolist()
        for part, first, low, high in zip(self.parts, [0, *ends], [0, *cuts], cuts):
            if high > low:
                local = index[low:high] - first
                torch.index_select(part[0], 0, local, out=x[low:high])
                torch.index_select(part[1], 0, local, out=t[low:high])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return x[back].float(), t[back].long()


def _mapped(folder: Path, line: dict, d_model: int) -> Pair:
    """The tensors of a shard, whose pages are read when they are used.

    torch's maps, unlike numpy's, keep no file open: there may be many.
    """
    path, m = str(folder / line["name"]), line["tokens"]
    x = torch.from_file(f"{path}.x", shared=False, size=m * d_model, dtype=torch.bfloat16)
    return x.view(m, d_model), torch.from_file(f"{path}.t", shared=False, size=m, dtype=torch.int32)


def _plan(rows: torch.Tensor, keep: Callable, tokens: int, shard_tokens: int,
          batch_rows: int) -> list[dict]:
    """The rows and the number of pairs of every shard.

    A shard is made of whole passes, so that it is the same to the last bit when it is made alone.
    """
    plan, left, first, filled = [], tokens or math.inf, 0, 0
    for row in range(0, len(rows), batch_rows):
        end = min(row + batch_rows, len(rows))
        count = min(left, int(keep(rows[row:end]).sum()))
        filled += count
        left -= count
        if filled and (filled >= shard_tokens or end == len(rows) or not left):
            plan.append(dict(name=f"{len(plan):05}", first_row=first, last_row=end, tokens=filled))
            first, filled = end, 0
        if not left:
            break
    if not plan:
        raise ValueError(NO_POSITION)
    return plan


# The manifest


def _empty_manifest(d_model: int, identity: dict, made_of: dict) -> dict:
    """The manifest of a store without a shard yet, with the types that json gives back."""
    manifest = dict(format=FORMAT, version=VERSION, d_model=d_model, dtype="bfloat16",
                    identity=identity, made_of=made_of, shards=[], complete=False)
    return json.loads(json.dumps(manifest, default=str))


def _manifest(folder: Path) -> dict:
    """The manifest of a store, every value of its type and no shard's name a path."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no store of activations in {folder}: make one with "
                                "Store.make")
    manifest = store.read_json(path)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {manifest.get('format')!r}, version "
                         f"{manifest.get('version')!r}: this code reads {FORMAT!r}, version {VERSION}")
    _check_types(path, manifest, HEAD)
    if manifest["dtype"] != "bfloat16" or manifest["d_model"] < 1:
        raise ValueError(f"{path} says {manifest['dtype']} of width {manifest['d_model']}: expected "
                         "bfloat16, 1 or up")
    for number, line in enumerate(manifest["shards"]):
        _check_types(path, line, SHARD)
        if line["name"] != f"{number:05}" or line["tokens"] < 1:
            raise ValueError(f"{path} names shard {line['name']!r} with {line['tokens']} pairs: "
                             f"expected the name '{number:05}' and 1 pair or more")
    if manifest["complete"] and not manifest["shards"]:
        raise ValueError(f"{path} is of a complete store without a shard: make it again")
    return manifest


def _check_types(path: Path, values: dict, types: dict[str, type]) -> None:
    values = values if isinstance(values, dict) else {}
    wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
    if wrong:
        raise ValueError(f"{path} is damaged at {', '.join(wrong)}: restore it, or delete the store "
                         "and make it again")


def _begun(folder: Path, wanted: dict, plan: list[dict]) -> dict:
    """The manifest in the folder, or `wanted` where there is none.

    Raises ValueError when the two are not of one store.
    """
    if not (folder / "manifest.json").is_file():
        return wanted
    there = _manifest(folder)
    for part in ("identity", "made_of"):
        for name in sorted(there[part].keys() | wanted[part].keys()):
            old, new = there[part].get(name), wanted[part].get(name)
            if old != new:
                raise ValueError(f"the store {folder} was made with {name} {old!r}, and {new!r} is "
                                 "asked for: use another folder, or delete this one")
    names = ("name", "first_row", "last_row", "tokens")
    begun = [{name: line[name] for name in names} for line in there["shards"]]
    if there["d_model"] != wanted["d_model"] or begun != plan[:len(begun)]:
        raise ValueError(f"the store {folder} has another width than {wanted['d_model']}, or other "
                         "positions than are kept now: use another folder, or delete this one")
    return there | {"complete": len(begun) == len(plan)}


# What is wrong with the files


def _bytes(shard: dict, kind: str, d_model: int) -> int:
    return shard["tokens"] * (2 * d_model if kind == "x" else 4)


def _faults(folder: Path, manifest: dict, checksums: bool) -> dict[int, str]:
    """{number of the shard: what is wrong with it}. Files are read where `checksums` are compared."""
    faults = {}
    for number, line in enumerate(manifest["shards"]):
        for kind in "xt":
            path = folder / f"{line['name']}.{kind}"
            size = _bytes(line, kind, manifest["d_model"])
            if not path.is_file():
                faults[number] = f"{path} is missing"
            elif path.resolve().parent != folder.resolve():
                faults[number] = f"{path} is a link that leaves the store"
            elif path.stat().st_size != size:
                faults[number] = f"{path} has {path.stat().st_size} bytes where {size} were written"
            elif checksums and store.digest(path) != line[f"sha256_{kind}"]:
                faults[number] = f"{path} has changed since it was written: its checksum differs"
    return faults


def _check_faults(folder: Path, manifest: dict, checksums: bool) -> None:
    if faults := _faults(folder, manifest, checksums):
        raise ValueError(f"{'; '.join(faults.values())}: run Store.make with the same arguments, "
                         "which mends it")


def _check_room(folder: Path, plan: list[dict], d_model: int, size: int, max_gb: float) -> None:
    """Raises ValueError for a store over `max_gb`, or when what it lacks exceeds the free space."""
    says = f"the store {folder} takes {size / 1e9:.3g} GB ({d_model} x 2 + 4 bytes a token)"
    if size > max_gb * 1e9:
        raise ValueError(f"{says}, more than `max_gb` = {max_gb:g}: raise it, or ask for fewer "
                         "`tokens`")
    lacking = 0
    for shard in plan:
        for kind in "xt":
            path, wanted = folder / f"{shard['name']}.{kind}", _bytes(shard, kind, d_model)
            if not path.is_file() or path.stat().st_size != wanted:
                lacking += wanted
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if lacking > free:
        raise ValueError(f"{says}, {lacking / 1e9:.3g} GB of it still to write, and the disk has "
                         f"{free / 1e9:.3g} GB free: make room, choose another folder, or ask for "
                         "fewer `tokens`")


# Writing


def _write_missing(folder: Path, manifest: dict, plan: list[dict],
                   pairs_of: Callable[[dict], Iterator[Pair]], checksums: bool) -> None:
    """Writes every shard that is missing or damaged, and the manifest after each of them."""
    lines, faults = manifest["shards"], _faults(folder, manifest, checksums)
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):  # of a process that was killed
            path.unlink()
    total = sum(shard["tokens"] for shard in plan)
    with tqdm(desc="activations", total=total, unit="tok", unit_scale=True, leave=False) as progress:
        for number, shard in enumerate(plan):
            with _disk_errors_explained(folder):
                if number in faults:
                    tqdm.write(f"{faults[number]}: shard {shard['name']} is made again",
                               file=sys.stderr)
                    _write_shard(folder, shard, pairs_of(shard), manifest["d_model"], lines[number])
                if number >= len(lines):
                    lines.append(_write_shard(folder, shard, pairs_of(shard), manifest["d_model"]))
                manifest["complete"] = len(lines) == len(plan)
                    store.write_json(folder / "manifest.json", manifest)
            progress.update(shard["tokens"])
