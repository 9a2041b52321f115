"""guard for a whole process: its threads, and the processes that it starts.

SAFE_INPLACE_GUARD=mode, or mode,verify, opens it when safe_inplace is imported. The process that begins hands the variable on to
those that it starts, with a folder on their PYTHONPATH whose sitecustomize.py (_child) imports safe_inplace as soon as torch is
imported there. What they find they leave in a folder of records, which the first process reads at its end.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import pickle
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from ._guard import Hazard, guard
from ._guard import say as notices
from ._guard.api import open_here
from ._guard.hazards import summary
from ._guard.modes import MODES

MODE = "SAFE_INPLACE_GUARD"
RECORDS = "SAFE_INPLACE_GUARD_RECORDS"
_INDUCTOR = os.path.join("torch", "_inductor", "")
_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_child")


def say(text: Callable[[bool], str]) -> None:
    """To stderr, in colour or not. Where the program has put something there that does not take it, to what was there before."""
    for stream in (sys.stderr, sys.__stderr__):
        if stream is None:
            continue
        try:
            print(text(wants_color(stream)), file=stream, flush=True)
            return
        except RuntimeError:  # a signal came while it was being written to
            os.write(2, f"{text(False)}\n".encode())
            return
        except Exception:  # whatever the program's own object raises: the verdict is not lost with it
            continue


def flushed(stream: Any) -> bool:
    try:
        stream.flush()
    except (AttributeError, ValueError, OSError, RuntimeError):
        # None, closed, full or gone, or being written to where a signal came.
        return False
    return True


def reach_children() -> None:
    """From here on sitecustomize.py in _child runs as each Python process begins that this one starts."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{_CHILD}{os.pathsep}{path}" if path else _CHILD


def wants_color(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def rank() -> int | None:
    """Of this process among those of a launcher such as torchrun."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() and "WORLD_SIZE" in os.environ else None


def of_this_rank(path: str) -> str:
    """Ranks write files of their own: found.json becomes found.rank3.json."""
    number = rank()
    stem, extension = os.path.splitext(path)
    return path if number is None else f"{stem}.rank{number}{extension}"


@dataclass
class Record:
    """What one process found."""

    pid: int = field(default_factory=os.getpid)
    rank: int | None = field(default_factory=rank)
    program: list[str] = field(default_factory=lambda: list(sys.argv))
    hazards: list[Hazard] = field(default_factory=list)
    threads: int = 0  # that were running when guard came to the process
    processes: int = 0  # Python that it started without what brings guard there
    why: str | None = None  # it was not guarded itself

    @property
    def repaired(self) -> bool:
        return all(hazard.repaired == hazard.count for hazard in self.hazards)

    def who(self) -> str:
        return "safe_inplace guard" if self.rank is None else f"safe_inplace guard, rank {self.rank}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "rank": self.rank,
            "program": self.program,
            "hazards": [hazard.as_dict() for hazard in self.hazards],
        }


class ProcessGuard:
    """Holds for the thread that starts it and for those that begin later. A process made by fork goes on with findings of its
    own."""

    def __init__(self, on_hazard: str, verify: bool, records: str) -> None:
        self.guard = guard(on_hazard, verify=verify)  # type: ignore[arg-type]
        self.records = records
        self._begin_record()

    def _begin_record(self) -> None:
        self.record = Record()
        self._name = f"{self.record.pid}-{os.urandom(4).hex()}"
        self._writing = threading.Lock()
        self.guard._findings.listener = self.keep
        # Not by warnings: the program may look at these, or have them as errors.
        self.guard._findings.teller = lambda hazard: say(lambda color: f"{self.record.who()}: {hazard.text(color)}\n")

    def start(self) -> None:
        global _current
        _install()
        _current = self
        self._listened, notices.listener = notices.listener, lambda words: say(lambda _: words)
        self.record.threads = threading.active_count() - 1
        self.guard.__enter__()
        atexit.register(self._at_exit)

    def leave(self) -> None:
        """The guard is left in this thread; others that are watched go on."""
        if any(opening.guard is self.guard for opening in open_here()):
            self.guard.__exit__(None, None, None)

    def stop(self) -> None:
        global _current
        self.leave()
        atexit.unregister(self._at_exit)
        notices.listener = self._listened
        _current = None

    def end(self, status: int) -> int:
        """The process is about to end with `status`; the answer is what it ends with."""
        self.keep()
        return status

    def give_way(self) -> None:
        """Another program is about to take the process over."""
        self.keep()

    def keep(self) -> None:
        """Each time that something new is found, since a process may end without notice, and at the end for the counts."""
        self.record.hazards = self.guard.hazards
        if not (self.record.hazards or self.record.threads or self.record.processes):
            return
        with self._writing, contextlib.suppress(FileNotFoundError):  # the process that would read it has ended
            partial = os.path.join(self.records, f"{self._name}.part")
            with open(partial, "wb") as file:
                pickle.dump(self.record, file)
            os.replace(partial, os.path.join(self.records, f"{self._name}.record"))

    def _at_exit(self) -> None:
        self.leave()
        self.end(0)

    def _in_child(self) -> None:
        self.guard._forget()
        self._begin_record()


class FirstGuard(ProcessGuard):
    """Of the process that begins: it brings guard to those that it starts, and tells what all have found."""

    def __init__(self, on_hazard: str, verify: bool) -> None:
        super().__init__(on_hazard, verify, tempfile.mkdtemp(prefix=f"safe_inplace-{os.getpid()}-"))
        self._pid = os.getpid()
        self._told = False
        self.others: list[Record] = []

    def start(self) -> None:
        os.environ[MODE] = f"{self.guard.on_hazard},verify" if self.guard.verify else self.guard.on_hazard
        os.environ[RECORDS] = self.records
        reach_children()
        super().start()

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.records, ignore_errors=True)

    def keep(self) -> None:
        if os.getpid() != self._pid:
            super().keep()

    def end(self, status: int) -> int:
        if os.getpid() != self._pid:
            return super().end(status)
        self._tell_once(status)
        return status

    def give_way(self) -> None:
        if os.getpid() != self._pid:
            super().give_way()
        else:
            self._tell_once(None)

    def _tell_once(self, status: int | None) -> None:
        self.record.hazards = self.guard.hazards
        if not self._told:
            self._told = True
            self.others = _gather(self.records)
            self.told(status)
            flushed(sys.stdout)
            say(lambda color: tell(self.record, self.others, color))

    def told(self, status: int | None) -> None:
        """None: another program takes the process over."""


def _gather(folder: str) -> list[Record]:
    records: list[Record] = []
    if not os.path.isdir(folder):  # the program has cleared all temporary files
        return records
    for name in sorted(os.listdir(folder)):
        if name.endswith(".record"):
            with open(os.path.join(folder, name), "rb") as file:
                records.append(pickle.load(file))
        elif name.endswith(".unguarded"):
            with open(os.path.join(folder, name)) as file:
                records.append(Record(pid=int(name.partition(".")[0]), rank=None, program=[], why=file.read()))
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(records, key=lambda record: (record.rank is None, record.rank, record.pid))


def unguarded(records: list[Record]) -> dict[str, int]:
    return {
        "threads": sum(record.threads for record in records),
        "processes": sum(record.processes + (record.why is not None) for record in records),
    }


def tell(first: Record, others: list[Record], color: bool = False) -> str:
    """What all processes have found."""
    found = [record for record in others if record.hazards]
    without = unguarded([first, *others])
    paragraphs = [summary(first.hazards, color, first.who())] if first.hazards or not (found or any(without.values())) else []
    for record in found:
        who = f"{record.who()}, process {record.pid} ({' '.join(record.program) or 'interactive'})"
        paragraphs.append(summary(record.hazards, color, who))
    counts = [
        f"{count} {one if count == 1 else many}"
        for one, many, count in (("thread", "threads", without["threads"]), ("process", "processes", without["processes"]))
        if count
    ]
    if counts:
        words = f"{' and '.join(counts)} ran unguarded"
        if not paragraphs:
            words = f"no hazards in what was watched, but {words}"
        paragraphs.append(f"{first.who()}: {words}")
        paragraphs += [f"process {record.pid}: {record.why}" for record in others if record.why]
    return "\n\n".join(paragraphs)


_current: ProcessGuard | None = None
_installed = False


def current() -> ProcessGuard | None:
    return _current


def _install() -> None:
    """Once, and for good: threads and exits ask who guards the process now."""
    global _installed
    if _installed:
        return
    _installed = True
    run_thread = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]
    start_thread = _thread.start_new_thread
    leave_at_once = os._exit
    replace, replace_with = os.execv, os.execve

    def watched_thread(thread: threading.Thread) -> None:
        _watched(run_thread, thread)

    def start_watched_thread(function: Callable[..., Any], *arguments: Any) -> int:
        return start_thread(_watched, (function, *arguments[0]), *arguments[1:])

    def end_at_once(status: int) -> NoReturn:
        leave_at_once(_current.end(status) if _current is not None else status)

    def give_way(path: Any, argv: Any, /) -> NoReturn:
        _give_way(path, argv, None)
        replace(path, argv)

    def give_way_with(path: Any, argv: Any, env: Any) -> NoReturn:
        _give_way(path, argv, env)
        replace_with(path, argv, env)

    threading.Thread._bootstrap_inner = watched_thread  # type: ignore[attr-defined]
    _thread.start_new_thread = start_watched_thread  # type: ignore[assignment]
    os._exit = end_at_once  # type: ignore[assignment]
    os.execv, os.execve = give_way, give_way_with  # type: ignore[assignment]  # the other six call these
    os.register_at_fork(after_in_child=lambda: _current._in_child() if _current is not None else None)
    sys.addaudithook(_on_event)


def _watched(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    process = _current
    with process.guard if process is not None else contextlib.nullcontext():
        function(*args, **kwargs)


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and _current is not None:
        executable, line, _, environment = arguments
        line = line if isinstance(line, (list, tuple)) else [line]
        if _escapes(executable or line[0], line, environment) and not _from_inductor():
            _current.record.processes += 1


def _give_way(path: Any, arguments: Any, environment: Mapping[Any, Any] | None) -> None:
    if _current is None:
        return
    if not isinstance(path, int):
        if not os.access(path, os.X_OK):
            return  # exec*p() tries the folders of PATH in turn
        _current.record.processes += _escapes(path, arguments, environment)
    _current.give_way()


def _escapes(executable: Any, line: Sequence[Any], environment: Mapping[Any, Any] | None) -> bool:
    """Whether it is Python, and begins without guard."""
    program = os.path.basename(os.fsdecode(executable))
    return program.startswith("python") and not _brings_guard([os.fsdecode(part) for part in line[1:]], environment)


def _from_inductor() -> bool:
    """What it starts compiles, and runs nothing of the program."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if _INDUCTOR in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _brings_guard(options: list[str], environment: Mapping[Any, Any] | None) -> bool:
    """What it finds arrives here, too."""
    if environment is None:
        environment = os.environ
    environment = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    if not (environment.get(MODE) and environment.get(RECORDS)):
        return False
    if _CHILD not in environment.get("PYTHONPATH", "").split(os.pathsep):
        return False
    for option in options:
        if not option.startswith("-") or option[1:2] in ("c", "m", "-", ""):
            return True
        if option[1] not in "WX" and set("IES") & set(option):
            return False
    return True


def start_from_environment() -> None:
    value = os.environ.get(MODE)
    if not value or _current is not None:
        return
    mode, _, rest = value.partition(",")
    if mode not in MODES or rest not in ("", "verify"):
        raise ValueError(f'{MODE} is {value!r}: set it to {", ".join(MODES)}, with ",verify" or without')
    records = os.environ.get(RECORDS, "")
    # exec() in the process that began leaves its variables, and nobody who would read a record.
    if os.path.isdir(records) and f"-{os.getpid()}-" not in os.path.basename(records):
        ProcessGuard(mode, rest == "verify", records).start()
    else:
        FirstGuard(mode, rest == "verify").start()
