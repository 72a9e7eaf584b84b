"""Pairs (x, t) that can be read at random: in memory, or on disk in shards that are written whole or not at all."""

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
from tsae.pairs.extract import NO_POSITION, Pair, activations, estimate, statistics

try:
    import fcntl
except ImportError:  # not a POSIX system: there two processes must not make one store at once
    fcntl = None

FORMAT, VERSION = "tsae-activations", 1


HEAD = dict(d_model=int, dtype=str, identity=dict, made_of=dict, shards=list, complete=bool)
SHARD = dict(name=str, first_row=int, last_row=int, tokens=int, sha256_x=str, sha256_t=str)


class _Rows:
    """Pairs that can be read at random, in parts x (m, d), t (m,)."""

    def __init__(self, parts: list[Pair]):
        self.parts, self.d_model = parts, parts[0][0].shape[1]
        self.ends = torch.tensor([len(t) for _, t in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def statistics(self, vocabulary: int) -> dict[str, torch.Tensor]:
        """`statistics` of all pairs."""
        return statistics(tqdm(self.parts, "statistics", leave=False, disable=len(self.parts) < 20), vocabulary)


class Memory(_Rows):
    """Pairs x (m, d), t (m,) held in memory, x in the dtype and on the device it was given."""

    def __init__(self, x: torch.Tensor, t: torch.Tensor):
        if len(x) != len(t) or not len(t):
            raise ValueError(f"{len(x)} activations and {len(t)} tokens were given: expected as many of both, and some")
        super().__init__([(x, t)])

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64."""
        x, t = self.parts[0]
        index = index.to(x.device)
        return x[index].float(), t[index].long()


class Store(_Rows):
    """Pairs on disk: shards of bfloat16 activations (<number>.x) and int32 token ids (<number>.t), raw, little-endian.

    `manifest.json` says what they are and holds their checksums. Shards are mapped into memory, not read: what the
    system caches of them it can take back. `make` writes a store or goes on with it, `open` reads a complete one.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.identity = folder, manifest, manifest["identity"]
        super().__init__([(_mapped(folder, shard, "x", torch.bfloat16, manifest["d_model"]),
                           _mapped(folder, shard, "t", torch.int32, 1).squeeze(1)) for shard in manifest["shards"]])

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """A complete store. Raises FileNotFoundError or ValueError that names what is missing, cut off or unknown."""
        manifest = _manifest(folder := Path(folder))
        if not manifest["complete"]:
            raise ValueError(f"the store {folder} is not complete, it has {len(manifest['shards'])} shards so far: run "
                             "Store.make with the same arguments to go on")
        _no_faults(folder, manifest, checksums=False)
        return cls(folder, manifest)

    @classmethod
    def make(cls, folder: str | Path, rows: torch.Tensor, residuals: Callable, keep: Callable, d_model: int,
             identity: dict, tokens: int = 0, shard_tokens: int = 131072, max_gb: float = 50.0, batch_rows: int = 64,
             verify_gb: float = 4.0) -> "Store":
        """The store of the positions of rows (N, T) that `keep` marks, the first `tokens` of them (0: all).

        `residuals(tokens (b, T)) -> x (b, T, d)` is run on `batch_rows` rows at a time; a shard ends with the pass that
        brings it to `shard_tokens` pairs. A store that is there, whole or in part, must be of the same arguments and
        `identity` (what names the data: language model, layer); what it lacks is made, damaged shards are made
        again, byte for byte. Sizes are always compared, checksums where the store has at most `verify_gb`. One process
        writes, others wait. Raises ValueError for another identity or a size over `max_gb` or the free space, OSError
        for a disk that is full or may not be written; then all whole shards stay.
        """
        if min(shard_tokens, batch_rows) < 1 or tokens < 0:
            raise ValueError(f"got {shard_tokens=}, {batch_rows=}, {tokens=}: the first two must be positive")
        folder = Path(folder)
        digest = hashlib.sha256(rows.cpu().to(torch.int32).contiguous().numpy()).hexdigest()
        made_of = dict(rows=digest, shape=list(rows.shape), tokens=tokens, shard_tokens=shard_tokens,
                       batch_rows=batch_rows)
        manifest = dict(format=FORMAT, version=VERSION, d_model=d_model, dtype="bfloat16", identity=identity,
                        made_of=made_of, shards=[], complete=False)
        manifest = json.loads(json.dumps(manifest, default=str))  # as it will be read again
        plan = _plan(rows, keep, tokens, shard_tokens, batch_rows)
        size = estimate(sum(shard["tokens"] for shard in plan), d_model)
        checksums = size <= verify_gb * 1e9
        begun = _begun(folder, manifest, plan)
        if begun["complete"] and not _faults(folder, begun, checksums):
            return cls.open(folder)
        _check_room(folder, plan, d_model, size, max_gb)
        with _alone(folder):
            manifest = _begun(folder, manifest, plan)
            faults, done = _faults(folder, manifest, checksums), manifest["shards"]
            for leftover in folder.iterdir():
                if re.fullmatch(r"\.(\d+|manifest)-\w+\.(x|t|json)", leftover.name):  # of a process that was killed
                    leftover.unlink()
            with tqdm(desc="activations", total=sum(shard["tokens"] for shard in plan), unit="tok", unit_scale=True,
                      leave=False) as progress:
                for number, shard in enumerate(plan):
                    expected = done[number] if number < len(done) else None
                    if number in faults:
                        tqdm.write(f"{faults[number]}: shard {shard['name']} is made again", file=sys.stderr)
                    if number in faults or not expected:
                        source = activations(rows, residuals, keep, batch_rows,
                                             torch.arange(shard["first_row"], shard["last_row"]))
                        with _told(folder):
                            done[number:number + 1] = [_written(folder, shard, source, d_model, expected)]
                            manifest["complete"] = len(done) == len(plan)
                            store.write_json(folder / "manifest.json", manifest)
                    progress.update(shard["tokens"])
        return cls.open(folder)

    def verify(self) -> None:
        """Reads everything. Raises ValueError that names each file which is not as it was written."""
        _no_faults(self.folder, self.manifest, checksums=True)

    def gather(self, index: torch.Tensor) -> Pair:
        """The pairs at index (b,) int64: x (b, d) float32, t (b,) int64. Raises IndexError outside of the store."""
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"the store has pairs 0 to {len(self) - 1}, got {int(index.min())} to {int(index.max())}")
        index, order = index.cpu().sort()  # neighbours on disk are read one after the other
        x = torch.empty(len(index), self.d_model, dtype=torch.bfloat16)
        t = torch.empty(len(index), dtype=torch.int32)
        low, first, cuts = 0, 0, torch.searchsorted(index, self.ends)
        for (part_x, part_t), high, end in zip(self.parts, cuts.tolist(), self.ends.tolist()):
            if high > low:
                local = index[low:high] - first
                torch.index_select(part_x, 0, local, out=x[low:high])
                torch.index_select(part_t, 0, local, out=t[low:high])
            low, first = high, end
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return x[back].float(), t[back].long()


def _plan(rows: torch.Tensor, keep: Callable, tokens: int, shard_tokens: int, batch_rows: int) -> list[dict]:
    """The rows and pairs of every shard: whole passes, so that a shard made alone is the same to the last bit."""
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
        raise FileNotFoundError(f"there is no store of activations in {folder}: make one with Store.make")
    manifest = store.read_json(path)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {manifest.get('format')!r}, version {manifest.get('version')!r}: this "
                         f"code reads {FORMAT!r}, version {VERSION}")
    _check_types(path, manifest, HEAD)
    if manifest["dtype"] != "bfloat16" or manifest["d_model"] < 1:
        raise ValueError(f"{path} says {manifest['dtype']} of width {manifest['d_model']}: expected bfloat16, 1 or up")
    for number, shard in enumerate(manifest["shards"]):
        _check_types(path, shard, SHARD)
        if shard["name"] != f"{number:05}" or shard["tokens"] < 1:
            raise ValueError(f"{path} names shard {shard['name']!r} with {shard['tokens']} pairs: expected the name "
                             f"'{number:05}' and 1 pair or more")
    if manifest["complete"] and not manifest["shards"]:
        raise ValueError(f"{path} is of a complete store without a shard: make it again")
    return manifest


def _check_types(path: Path, values: dict, types: dict[str, type]) -> None:
    wrong = [name for name, kind in types.items() if not isinstance(values, dict) or type(values.get(name)) is not kind]
    if wrong:
        raise ValueError(f"{path} is damaged at {', '.join(wrong)}: restore it, or delete the store and make it again")


def _begun(folder: Path, wanted: dict, plan: list[dict]) -> dict:
    """The manifest in the folder, or `wanted` where there is none. Raises ValueError when they are not of one store."""
    if not (folder / "manifest.json").is_file():
        return wanted
    there = _manifest(folder)
    for part in ("identity", "made_of"):
        for name in sorted(there[part].keys() | wanted[part].keys()):
            if (old := there[part].get(name)) != (new := wanted[part].get(name)):
                raise ValueError(f"the store {folder} was made with {name} {old!r}, and {new!r} is asked for: use "
                                 "another folder, or delete this one")
    begun = [{name: shard[name] for name in ("name", "first_row", "last_row", "tokens")} for shard in there["shards"]]
    if there["d_model"] != wanted["d_model"] or begun != plan[:len(begun)]:
        raise ValueError(f"the store {folder} has another width than {wanted['d_model']}, or other positions than are "
                         "kept now: use another folder, or delete this one")
    return there | {"complete": len(begun) == len(plan)}


def _size(shard: dict, kind: str, d_model: int) -> int:
    return shard["tokens"] * (2 * d_model if kind == "x" else 4)


def _faults(folder: Path, manifest: dict, checksums: bool) -> dict[int, str]:
    """{number of the shard: what is wrong with it}, read whole where `checksums` are compared."""
    faults = {}
    for number, shard in enumerate(manifest["shards"]):
        for kind in "xt":
            path, size = folder / f"{shard['name']}.{kind}", _size(shard, kind, manifest["d_model"])
            if not path.is_file():
                faults[number] = f"{path} is missing"
            elif path.resolve().parent != folder.resolve():
                faults[number] = f"{path} is a link that leaves the store"
            elif path.stat().st_size != size:
                faults[number] = f"{path} has {path.stat().st_size} bytes where {size} were written"
            elif checksums and store.digest(path) != shard[f"sha256_{kind}"]:
                faults[number] = f"{path} has changed since it was written: its checksum differs"
    return faults


def _no_faults(folder: Path, manifest: dict, checksums: bool) -> None:
    if faults := _faults(folder, manifest, checksums):
        raise ValueError(f"{'; '.join(faults.values())}: run Store.make with the same arguments, which mends it")


def _check_room(folder: Path, plan: list[dict], d_model: int, size: int, max_gb: float) -> None:
    """Raises ValueError when the store would be larger than `max_gb`, or what it lacks larger than the free space."""
    says = f"the store {folder} takes {size / 1e9:.3g} GB ({d_model} x 2 + 4 bytes a token)"
    if size > max_gb * 1e9:
        raise ValueError(f"{says}, more than `max_gb` = {max_gb:g}: raise it, or ask for fewer `tokens`")
    paths = {folder / f"{shard['name']}.{kind}": _size(shard, kind, d_model) for shard in plan for kind in "xt"}
    lacking = sum(size for path, size in paths.items() if not path.is_file() or path.stat().st_size != size)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if lacking > (free := shutil.disk_usage(existing).free):
        raise ValueError(f"{says}, {lacking / 1e9:.3g} GB of it still to write, and the disk has {free / 1e9:.3g} GB "
                         "free: make room, choose another folder, or ask for fewer `tokens`")


def _written(folder: Path, shard: dict, source: Iterator[Pair], d_model: int, expected: dict | None) -> dict:
    """Writes the pairs of a shard under temporary names, then its own; returns its line of the manifest."""
    left, sums = shard["tokens"], {"x": hashlib.sha256(), "t": hashlib.sha256()}
    paths = [folder / f"{shard['name']}.{kind}" for kind in "xt"]
    with (store.replacing(paths[0]) as x_path, store.replacing(paths[1]) as t_path,
          open(x_path, "wb") as x_file, open(t_path, "wb") as t_file):
        for x, t in source:
            if x.shape[1] != d_model:
                raise ValueError(f"the language model gives activations of width {x.shape[1]}, d_model is {d_model}")
            raw = {"x": x[:left].bfloat16().cpu().view(torch.int16).numpy().astype("<i2", copy=False),
                   "t": t[:left].cpu().numpy().astype("<i4", copy=False)}
            for kind, file in (("x", x_file), ("t", t_file)):
                file.write(raw[kind])
                sums[kind].update(raw[kind])
            left -= len(raw["t"])
        line = shard | {f"sha256_{kind}": checksum.hexdigest() for kind, checksum in sums.items()}
        if left or (expected and line != expected):
            raise ValueError(f"shard {shard['name']} of {folder}, made again, is not what it was: the model, the "
                             "machine or a library has changed; restore it from a copy, or make the whole store again")
    return line


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Says in a sentence what a full disk or a read-only folder means for the store."""
    reasons = dict.fromkeys([errno.ENOSPC, errno.EDQUOT], "its disk is full: make room")
    reasons |= dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS], "it is read-only: choose another folder")
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise OSError(f"the store {folder} could not be written, {reasons[error.errno]}. All whole shards stay, and "
                      f"the same Store.make goes on from there ({error})") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process writes this store: it waits here until this one is done or dead."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"another process is writing the store {folder}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mapped(folder: Path, shard: dict, kind: str, dtype: torch.dtype, width: int) -> torch.Tensor:
    """A shard's file as a tensor (tokens, width) whose pages are read when they are used."""
    path = str(folder / f"{shard['name']}.{kind}")  # torch's maps, unlike numpy's, keep no file open: there may be many
    return torch.from_file(path, shared=False, size=shard["tokens"] * width, dtype=dtype).view(-1, width)
