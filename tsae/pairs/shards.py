"""Pairs (x, t) that can be read at random: in memory, or on disk in a store.

A store is a folder: shards of bfloat16 activations (<number>.x) and int32 token ids (<number>.t),
raw, little-endian; and `manifest.json`, which says what they are and holds their checksums. A file
is written whole or not at all, a shard before the manifest that names it: a kill does no harm.
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
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from tsae import store
from tsae.baseline import Needs
from tsae.pairs.extract import NO_POSITION, Pair, activations, statistics

try:
    import fcntl
except ImportError:  # not a POSIX system: there two processes must not make one store at once
    fcntl = None

# Raise the version by hand whenever the same rows give other bytes: a golden-digest test guards it.
FORMAT, VERSION = "tsae-activations", 1
HEAD = dict(d_model=int, dtype=str, identity=dict, made_of=dict, shards=list, complete=bool)
SHARD = dict(name=str, first_row=int, last_row=int, tokens=int, sha256_x=str, sha256_t=str)
LEFTOVER = re.compile(r"\.(\d+|manifest)-\w+\.(x|t|json)")  # a temporary file of store.replacing
FULL, CLOSED = "its disk is full: make room", "it is read-only: choose another folder"
REASONS = {errno.ENOSPC: FULL, errno.EDQUOT: FULL,
           errno.EACCES: CLOSED, errno.EPERM: CLOSED, errno.EROFS: CLOSED}


class Pairs:
    """Pairs that can be read at random, in parts x (m, d), t (m,)."""

    def __init__(self, parts: list[Pair]):
        self.parts, self.d_model = parts, parts[0][0].shape[1]
        self.ends = torch.tensor([len(t) for _, t in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def statistics(self, vocabulary: int, limit: float = math.inf) -> dict[str, torch.Tensor]:
        """The `Moments` of all pairs with a norm of at most `limit`."""
        few = len(self.parts) < 20
        parts = self.parts if few else tqdm(self.parts, "statistics", leave=False)
        return statistics((within(x, t, limit) for x, t in parts), vocabulary)

    def below(self, limit: float) -> torch.Tensor:
        """Where (len(self),) the norm of x is at most `limit`: no sink."""
        return torch.cat([norms(x) <= limit for x, _ in self.parts])


class Some:
    """Those of `pairs` that lie at index (m,) int64, read as if there were no others."""

    def __init__(self, pairs: "Pairs | InContext", index: torch.Tensor):
        self.pairs, self.index = pairs, index

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64."""
        return self.pairs.gather(self.index[index])


class InContext:
    """`pairs` whose t is a Context: ids (m, grams) of the last tokens, and other layers' pairs."""

    def __init__(self, pairs: Pairs, needs: Needs, ids: torch.Tensor, layers: dict[int, Pairs]):
        self.pairs, self.needs, self.ids, self.layers = pairs, needs, ids, layers

    def __len__(self) -> int:
        return len(self.pairs)

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t a Context."""
        x, _ = self.pairs.gather(index)
        others = [self.layers[n].gather(index)[0] if n in self.layers else x
                  for n in self.needs.layers]
        return x, self.needs.joined([self.ids[index].to(x.device), *others])


def norms(x: torch.Tensor) -> torch.Tensor:
    """The norm (m,) float32 of each row of x (m, d), part by part: float32 copies are large."""
    return torch.cat([part.float().norm(dim=-1) for part in x.split(8192)])


def within(x: torch.Tensor, t: torch.Tensor, limit: float) -> Pair:
    """The pairs x (m, d), t (m,) with a norm of at most `limit`."""
    kept = norms(x) <= limit
    return (x, t) if kept.all() else (x[kept], t[kept.to(t.device)])


class Memory(Pairs):
    """Pairs x (m, d), t (m,) in memory, x in the dtype and on the device it was given."""

    def __init__(self, x: torch.Tensor, t: torch.Tensor):
        if len(x) != len(t) or not len(t):
            raise ValueError(f"got {len(x)} x and {len(t)} t: expected as many of both, and some")
        super().__init__([(x, t)])

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64."""
        x, t = self.parts[0]
        index = index.to(x.device)
        return x[index].float(), t[index].long()


class Store(Pairs):
    """Pairs on disk. `make` writes a store or goes on with it, `open` reads a complete one."""

    def __init__(self, folder: Path, manifest: dict):
        self.identity, d, parts = manifest["identity"], manifest["d_model"], []
        for shard in manifest["shards"]:  # mapped by torch, which unlike numpy keeps no file open
            path, m = folder / shard["name"], shard["tokens"]
            x = torch.from_file(f"{path}.x", shared=False, size=m * d, dtype=torch.bfloat16)
            t = torch.from_file(f"{path}.t", shared=False, size=m, dtype=torch.int32)
            parts.append((x.view(m, d), t))
        super().__init__(parts)

    @classmethod
    def open(cls, folder: str | Path, checksums: bool = False) -> "Store":
        """A complete store. Raises FileNotFoundError or ValueError that names what is wrong."""
        folder = Path(folder)
        manifest = _manifest(folder)
        if not manifest["complete"]:
            raise ValueError(f"the store {folder} is not complete, it has {len(manifest['shards'])}"
                             " shards so far: run Store.make with the same arguments to go on")
        if faults := _faults(folder, manifest, checksums):
            raise ValueError(f"{'; '.join(faults.values())}: the same Store.make mends it")
        return cls(folder, manifest)

    @classmethod
    def make(cls, folder: str | Path, rows: torch.Tensor, residuals: Callable, keep: Callable,
             d_model: int, identity: dict, tokens: int = 0, shard_tokens: int = 131072,
             max_gb: float = 50.0, batch_rows: int = 64, verify_gb: float = 4.0) -> "Store":
        """The store of the pairs that `activations` gives, the first `tokens` of them (0: all).

        A shard ends with the pass that brings it to `shard_tokens` pairs. A store that is there
        must be of the same arguments and `identity` (what names the data: language model, layer).
        Missing and damaged shards are made, byte for byte; checksums are compared up to
        `verify_gb`. One process writes, others wait. A size over `max_gb` or a full disk raises.
        """
        if min(shard_tokens, batch_rows) < 1 or tokens < 0:
            raise ValueError(f"{shard_tokens=}, {batch_rows=} must be positive, {tokens=}: 0 or up")
        folder = Path(folder)
        digest = hashlib.sha256(rows.cpu().to(torch.int32).contiguous().numpy()).hexdigest()
        made_of = dict(rows=digest, shape=list(rows.shape), tokens=tokens,
                       shard_tokens=shard_tokens, batch_rows=batch_rows)
        wanted = dict(format=FORMAT, version=VERSION, d_model=d_model, dtype="bfloat16",
                      identity=identity, made_of=made_of, shards=[], complete=False)
        wanted = json.loads(json.dumps(wanted, default=str))  # as it will be read again
        plan = _plan(rows, keep, tokens, shard_tokens, batch_rows)
        size = sum(size for shard in plan for _, size, _ in _files(folder, shard, d_model))
        checksums = size <= verify_gb * 1e9
        source = partial(activations, rows, residuals, keep, batch_rows)
        manifest = _begun(folder, wanted, plan)
        if not manifest["complete"] or _faults(folder, manifest, checksums):
            _check_room(folder, plan, d_model, size, max_gb)
            with _writing(folder):
                manifest = _begun(folder, wanted, plan)  # another process may have written since
                _write_missing(folder, manifest, plan, source, checksums)
        return cls.open(folder)

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64. Raises IndexError."""
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"only pairs 0 to {len(self) - 1}, got {index.min()} to {index.max()}")
        index, order = index.cpu().sort()  # so that neighbours on disk are read one after the other
        x = torch.empty(len(index), self.d_model, dtype=torch.bfloat16)
        t = torch.empty(len(index), dtype=torch.int32)
        ends, cuts = self.ends.tolist(), torch.searchsorted(index, self.ends).tolist()
        for (part_x, part_t), first, low, high in zip(self.parts, [0, *ends], [0, *cuts], cuts):
            if high > low:
                local = index[low:high] - first
                torch.index_select(part_x, 0, local, out=x[low:high])
                torch.index_select(part_t, 0, local, out=t[low:high])
        back = order.argsort()
        return x[back].float(), t[back].long()


def _files(folder: Path, shard: dict, d_model: int) -> list[tuple[Path, int, str | None]]:
    """(path, bytes, checksum) of the two files of a shard; no checksum before it is written."""
    name, m = shard["name"], shard["tokens"]
    return [(folder / f"{name}.x", m * d_model * 2, shard.get("sha256_x")),
            (folder / f"{name}.t", m * 4, shard.get("sha256_t"))]


def _plan(rows: torch.Tensor, keep: Callable, tokens: int, shard_tokens: int,
          batch_rows: int) -> list[dict]:
    """Rows and pairs of every shard: whole passes, so that one made alone has the same bits."""
    plan, left, first, filled = [], tokens or math.inf, 0, 0
    for row in range(0, len(rows), batch_rows):
        end = min(row + batch_rows, len(rows))
        count = min(left, int(keep(rows[row:end]).sum()))
        filled, left = filled + count, left - count
        if filled and (filled >= shard_tokens or end == len(rows) or not left):
            plan.append(dict(name=f"{len(plan):05}", first_row=first, last_row=end, tokens=filled))
            first, filled = end, 0
        if not left:
            break
    if not plan:
        raise ValueError(NO_POSITION)
    return plan


def _manifest(folder: Path) -> dict:
    """The manifest of a store, every value of its type and no shard's name a path."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"no store of activations in {folder}: make one with Store.make")
    manifest = store.read_json(path)
    name, version = manifest.get("format"), manifest.get("version")
    if (name, version) != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {name!r}, version {version!r}: this code reads "
                         f"{FORMAT!r}, version {VERSION}; delete the store and make it again")
    _check_types(path, manifest, HEAD)
    if manifest["dtype"] != "bfloat16" or manifest["d_model"] < 1:
        raise ValueError(f"{path} says {manifest['dtype']} of width {manifest['d_model']}: "
                         "expected bfloat16, 1 or up")
    for number, shard in enumerate(manifest["shards"]):
        _check_types(path, shard, SHARD)
        if shard["name"] != f"{number:05}" or shard["tokens"] < 1:
            raise ValueError(f"{path} names shard {shard['name']!r} with {shard['tokens']} pairs: "
                             f"expected the name '{number:05}' and 1 pair or more")
    if manifest["complete"] and not manifest["shards"]:
        raise ValueError(f"{path} is of a complete store without a shard: make it again")
    return manifest


def _check_types(path: Path, values: object, types: dict[str, type]) -> None:
    values = values if isinstance(values, dict) else {}
    if wrong := [name for name, kind in types.items() if type(values.get(name)) is not kind]:
        raise ValueError(f"{path} is damaged at {', '.join(wrong)}: restore it, or delete the "
                         "store and make it again")


def _begun(folder: Path, wanted: dict, plan: list[dict]) -> dict:
    """The manifest in the folder, else `wanted`. Raises ValueError if they are not of one store."""
    if not (folder / "manifest.json").is_file():
        return wanted
    there = _manifest(folder)
    for part in ("identity", "made_of"):
        for name in sorted(there[part].keys() | wanted[part].keys()):
            old, new = there[part].get(name), wanted[part].get(name)
            if old != new:
                raise ValueError(f"the store {folder} was made with {name} {old!r}, and {new!r} is "
                                 "asked for: use another folder, or delete this one")
    agreed = [shard | planned for shard, planned in zip(there["shards"], plan)]
    if there["d_model"] != wanted["d_model"] or there["shards"] != agreed:
        raise ValueError(f"the store {folder} has another width than {wanted['d_model']}, or other "
                         "positions than are kept now: use another folder, or delete this one")
    return there | {"complete": len(agreed) == len(plan)}


def _faults(folder: Path, manifest: dict, checksums: bool) -> dict[int, str]:
    """{number of a shard: what is wrong with it}. To compare `checksums` all files are read."""
    faults = {}
    for number, shard in enumerate(manifest["shards"]):
        for path, size, checksum in _files(folder, shard, manifest["d_model"]):
            if not path.is_file():
                faults[number] = f"{path} is missing"
            elif path.resolve().parent != folder.resolve():
                faults[number] = f"{path} is a link that leaves the store"
            elif path.stat().st_size != size:
                faults[number] = f"{path} has {path.stat().st_size} bytes where {size} were written"
            elif checksums and store.digest(path) != checksum:
                faults[number] = f"{path} has changed since it was written: its checksum differs"
    return faults


def _check_room(folder: Path, plan: list[dict], d_model: int, size: int, max_gb: float) -> None:
    """Raises ValueError if the store exceeds `max_gb`, or what it lacks exceeds the free space."""
    says = f"the store {folder} takes {size / 1e9:.3g} GB ({d_model} x 2 + 4 bytes a token)"
    if size > max_gb * 1e9:
        raise ValueError(f"{says}, over `max_gb` = {max_gb:g}: raise it, or ask for fewer `tokens`")
    lacking = sum(size for shard in plan for path, size, _ in _files(folder, shard, d_model)
                  if not path.is_file() or path.stat().st_size != size)
    existing = next(path for path in (folder / "manifest.json").absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if lacking > free:
        raise ValueError(f"{says}, {lacking / 1e9:.3g} GB of it still to write, and the disk has "
                         f"{free / 1e9:.3g} GB free: make room, move it, or take fewer `tokens`")


def _write_missing(folder: Path, manifest: dict, plan: list[dict], source: Callable,
                   checksums: bool) -> None:
    """Writes every shard that is missing or damaged, and the manifest after each of them."""
    shards, faults = manifest["shards"], _faults(folder, manifest, checksums)
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):  # of a process that was killed
            path.unlink()
    for number, planned in enumerate(tqdm(plan, "activations", unit="shard", leave=False)):
        expected = shards[number] if number < len(shards) else None
        if number in faults:
            tqdm.write(f"{faults[number]}: shard {planned['name']} is made again", file=sys.stderr)
        elif expected:
            continue
        pairs = source(torch.arange(planned["first_row"], planned["last_row"]))
        shard = _write_shard(folder, planned, pairs, manifest["d_model"], expected)
        shards[number:number + 1] = [shard]  # a new one, or the same again
        manifest["complete"] = len(shards) == len(plan)
        store.write_json(folder / "manifest.json", manifest)


def _write_shard(folder: Path, planned: dict, pairs: Iterator[Pair], d_model: int,
                 expected: dict | None) -> dict:
    """Writes a shard's files, unless they are not the `expected`; returns its manifest entry."""
    left, sums = planned["tokens"], dict(x=hashlib.sha256(), t=hashlib.sha256())
    (x_path, _, _), (t_path, _, _) = _files(folder, planned, d_model)
    with (store.replacing(x_path) as x_temporary, store.replacing(t_path) as t_temporary,
          open(x_temporary, "wb") as x_file, open(t_temporary, "wb") as t_file):
        for x, t in pairs:
            if x.shape[1] != d_model:
                raise ValueError(f"the model gives width {x.shape[1]}, d_model is {d_model}")
            raw_x = x[:left].bfloat16().cpu().view(torch.int16).numpy().astype("<i2", copy=False)
            raw_t = t[:left].cpu().numpy().astype("<i4", copy=False)
            for raw, file, checksum in ((raw_x, x_file, sums["x"]), (raw_t, t_file, sums["t"])):
                file.write(raw)
                checksum.update(raw)
            left -= len(raw_t)
        shard = planned | {f"sha256_{kind}": value.hexdigest() for kind, value in sums.items()}
        if left or (expected and shard != expected):
            raise ValueError(f"shard {shard['name']} of {folder}, made again, is not what it was: "
                             "model, machine or library changed; restore a copy or make all again")
    return shard


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Only this process writes the store: others wait. A disk that refuses gets a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            if fcntl:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    tqdm.write(f"{folder}: waiting for another process to write", file=sys.stderr)
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise OSError(f"the store {folder} could not be written, {REASONS[error.errno]}. Whole "
                      f"shards stay, the same Store.make goes on from there ({error})") from error
