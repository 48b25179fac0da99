"""Unfinished builds and caches that are not as they were left."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults_kill import kill_at_rows
from faults_site import ONE, SHARDS, FaultError, Row, Site, Way, check_said, files_of, require

from quantkit.building.folder import folder_of

Damage = Callable[[Site, Path, random.Random], object]


def _flip(path: Path, rng: random.Random, bits: int = 1, begin: int = 0, end: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(bits):
        raw[rng.randrange(begin, end or len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def _made(out: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder_of(out).glob("*.gguf")))


def _with_rows(out: Path, rng: random.Random) -> Path:
    """A file with some rows, unfinished or with its name."""
    every = sorted([*folder_of(out).glob("*.gguf"), *out.parent.glob("*.gguf")])
    return rng.choice([p for p in every if p.read_bytes()[1 << 16 :].strip(b"\0")])


def _journal(out: Path) -> Path:
    return folder_of(out) / "journal"


def _cut(path: Path, rng: random.Random, end: int | None = None, begin: int = 0) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(begin, end or len(raw))])


def _first_line(journal: Path) -> int:
    """Its bytes, with the newline."""
    return journal.read_bytes().index(b"\n") + 1


def _of_another_run(site: Site, out: Path, _rng: random.Random) -> None:
    other = site.place()
    kill_at_rows(site, other, Way("other", (*ONE.options, "--imatrix", str(site.other_imatrix))))
    shutil.copy(_journal(other), _journal(out))
    shutil.rmtree(other.parent)


def _same_length(_site: Site, out: Path, rng: random.Random) -> None:
    """The file's rows gone to zeros: its length as it was."""
    path = _with_rows(out, rng)
    size, head = path.stat().st_size, path.read_bytes()[: 1 << 16]
    path.write_bytes(head.ljust(size, b"\0"))


DAMAGES: dict[str, tuple[int, Damage]] = {
    "journal: a bit flipped in the records": (
        8, lambda _s, out, rng: _flip(_journal(out), rng, 1, _first_line(_journal(out)))),
    "journal: a bit flipped in the first line": (
        4, lambda _s, out, rng: _flip(_journal(out), rng, 1, 0, _first_line(_journal(out)) - 1)),
    "journal: cut in the records": (6, lambda _s, out, rng: _cut(_journal(out), rng, begin=_first_line(_journal(out)))),
    "journal: cut in the first line": (2, lambda _s, out, rng: _cut(_journal(out), rng, _first_line(_journal(out)))),
    "journal: garbage": (2, lambda _s, out, rng: _journal(out).write_bytes(rng.randbytes(5000))),
    "journal: garbage after it": (
        2, lambda _s, out, rng: _journal(out).write_bytes(_journal(out).read_bytes() + rng.randbytes(500))),
    "journal: empty": (2, lambda _s, out, _rng: _journal(out).write_bytes(b"")),
    "journal: of another run": (2, _of_another_run),
    "header half-written": (2, lambda _s, out, rng: _half_header(_made(out, rng), rng)),
    "rows: bits flipped": (6, lambda _s, out, rng: _flip(_with_rows(out, rng), rng, 40)),
    "rows: zeros": (2, _same_length),
    "file cut": (3, lambda _s, out, rng: _cut(_made(out, rng), rng)),
    "file too long": (2, lambda _s, out, rng: _made(out, rng).open("ab").write(b"more")),
    "file gone": (2, lambda _s, out, rng: _made(out, rng).unlink()),
    "file a folder": (2, lambda _s, out, rng: _to_folder(_made(out, rng))),
    "file a link": (2, lambda _s, out, rng: _to_link(_made(out, rng))),
    "lock: garbage": (2, lambda _s, out, rng: (folder_of(out) / "lock").write_bytes(rng.randbytes(99))),
    "lock gone": (2, lambda _s, out, _rng: (folder_of(out) / "lock").unlink()),
    "lock a folder": (2, lambda _s, out, _rng: _to_folder(folder_of(out) / "lock")),
}  # fmt: skip


def _half_header(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as f:
        f.seek(rng.randrange(24, 4096))
        f.write(bytes(40000))


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def damages(site: Site) -> list[Row]:
    """Each is done to an unfinished build; it goes on to the right bytes, or is refused and starts again."""
    rows, templates = [], []
    for way in (ONE, SHARDS):
        out = site.place()
        kill_at_rows(site, out, way, named=way is SHARDS)
        templates.append((way, out))
    for name, (times, damage) in DAMAGES.items():
        row, refused, kept, could, forced = Row(name, "", times, ""), 0, 0, 0, 0
        for n in range(times):
            way, template = templates[n % 2]
            out = site.folder / template.parent.name / template.name
            aside = site.folder / "aside"
            shutil.copytree(template.parent, aside)
            could += site.claimed(template)
            try:
                # in place: a journal knows its sources, not where it is
                for _ in range(20):
                    damage(site, out, site.rng)
                    if _differs(out.parent, aside):
                        break
                else:
                    raise FaultError("nothing was damaged")
                sound = site.claimed(out)
                got = site.fork(out, way)
                if got.code:
                    check_said(got, 7, 13)
                    refused += 1
                    if (folder_of(out) / "lock").is_dir():
                        (folder_of(out) / "lock").rmdir()
                    again = site.fork(out, way, "--restart")
                    if "exists; choose another name" in again.err:
                        # shards with their names, and no journal that says whose: not to be replaced unasked
                        check_said(again, 7)
                        require(bool(files_of(out)), "no file has a name")
                        forced += 1
                        again = site.fork(out, way, "--restart", "--force")
                    site.check_finished(out, way, again)
                else:
                    kept += got.kept
                    site.check_finished(out, way, got)
                    rows_are_whole = name.startswith("journal: ")
                    require(
                        got.kept == sound or not rows_are_whole,
                        f"kept {got.kept:,} weights, the journal still had {sound:,}",
                    )
            except FaultError as e:
                row.failures.append(f"{way.name}: {e}")
            shutil.rmtree(template.parent)
            aside.rename(template.parent)
        row.what = "an unfinished build"
        ended = f"{refused} refused, started again ({forced} with --force)"
        row.came_of_it = f"{times - refused} went on, {ended}; {kept:,} of {could:,} weights kept"
        row.kept = kept
        rows.append(row)
    return rows


def _differs(a: Path, b: Path) -> bool:
    def all_of(folder: Path) -> dict[str, object]:
        return {str(p.relative_to(folder)): (p.is_symlink(), p.is_file() and p.read_bytes()) for p in folder.rglob("*")}

    return all_of(a) != all_of(b)


def place_taken(site: Site) -> Row:
    """What has the name of the folder is another's: it is left as it is."""
    row = Row(
        "OUT.partial is another's", "a file; a link to a folder; a link to nowhere; a folder with other files", 4, ""
    )
    for how in ("file", "link", "dangling", "folder"):
        out = site.place()
        folder, precious = folder_of(out), site.folder / f"precious-{how}"
        precious.mkdir()
        (precious / "thesis.txt").write_text("ten years")
        if how == "file":
            folder.write_text("mine")
        elif how == "folder":
            shutil.copytree(precious, folder)
        else:
            folder.symlink_to(precious if how == "link" else precious / "nowhere")
        for more in ((), ("--restart",)):
            try:
                check_said(site.fork(out, ONE, "-q", *more), 7)
                require((precious / "thesis.txt").exists(), f"{how}: files behind the link are gone")
                require(how != "folder" or (folder / "thesis.txt").exists(), "the folder's files are gone")
                require(how != "file" or folder.read_text() == "mine", "the file is gone")
            except FaultError as e:
                row.failures.append(f"{how}: {e}")
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink(missing_ok=True)
        site.check_rerun(out, ONE)
    row.came_of_it = "refused, nothing touched"
    return row


def caches(site: Site) -> list[Row]:
    """A cache in which nothing can be trusted costs time only."""
    cache = site.folder / "cache-damaged"
    way = Way("cache", (*ONE.options, "--cache", str(cache)))
    template = site.folder / "cache-template"
    site.check_rerun(site.place(), way)
    cache.rename(template)
    entries = sorted((template / "objects").glob("??/*"))
    relative = [e.relative_to(template) for e in entries]
    rows = []

    def swap() -> None:
        """Entries of the same size, each under the name of another."""
        by_size: dict[int, list[Path]] = {}
        for r in relative:
            by_size.setdefault((cache / r).stat().st_size, []).append(cache / r)
        for same in by_size.values():
            contents = [p.read_bytes() for p in same]
            for p, raw in zip(same, contents[1:] + contents[:1], strict=True):
                p.write_bytes(raw)

    def entries_are(change: Callable[[Path], object], step: int = 1) -> None:
        for r in relative[::step]:
            change(cache / r)

    def memos(change: Callable[[Path], object]) -> None:
        for path in (cache / "sources").iterdir():
            change(path)

    def rotate_memos() -> None:
        """The digests of each file among themselves."""
        for path in (cache / "sources").iterdir():
            text = path.read_text()
            words = text.split('"')
            digests = [i for i, w in enumerate(words) if len(w) == 64]
            moved = [words[i] for i in digests[1:] + digests[:1]]
            for i, w in zip(digests, moved, strict=True):
                words[i] = w
            path.write_text('"'.join(words))

    def without_folders() -> None:
        for name in ("objects", "sources", "tmp"):
            shutil.rmtree(cache / name)

    rng = site.rng
    every: dict[str, Callable[[], object]] = {
        "cache: a bit flipped in each entry": lambda: entries_are(lambda p: _flip(p, rng)),
        "cache: each entry cut": lambda: entries_are(lambda p: _cut(p, rng)),
        "cache: each entry garbage": lambda: entries_are(lambda p: p.write_bytes(rng.randbytes(9999))),
        "cache: entries swapped": swap,
        "cache: entries are folders": lambda: entries_are(_to_folder, 2),
        "cache: digests garbage": lambda: memos(lambda p: p.write_bytes(rng.randbytes(999))),
        "cache: digests cut": lambda: memos(lambda p: _cut(p, rng)),
        "cache: digests moved about": rotate_memos,
        "cache: stale unfinished entries": lambda: [
            (cache / "tmp" / f"tmp{i}").write_bytes(rng.randbytes(999)) for i in range(9)],
        "cache: its folders gone": without_folders,
    }  # fmt: skip
    for name, damage in every.items():
        row = Row(name, f"a cache of {len(entries)} entries", 1, "the right bytes")
        shutil.copytree(template, cache)
        damage()
        try:
            require(_differs(cache, template), "nothing was damaged")
            out = site.place()
            got = site.fork(out, way)
            require("Traceback" not in got.err and got.code == 0, f"exit {got.code}: {got.err[-500:]}")
            require(files_of(out) == site.expected(ONE), "other bytes than the undisturbed build's")
            said = [line for line in got.out.splitlines() if line.startswith("cache: ")]
            row.came_of_it = f"the right bytes; {said[0].split(',')[0]} came from it"
        except FaultError as e:
            row.failures.append(str(e))
        shutil.rmtree(cache)
        rows.append(row)
    return rows
