"""Processes that die, or find the disk full, at a chosen operation on a folder.

Started as a program it imports the library once, and then forks for every life that it is asked
for: a life takes as long as its work, without the seconds of an interpreter that imports torch.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Server:
    """Lives on request; ends with the process that made it."""

    def __init__(self):
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
        # one thread and no GPU: what has started neither may be forked
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            text=True,
            start_new_session=True,  # a group of its own, with the life that it is at
        )

    def live(self, work: str, folder: Path, **how) -> dict:
        """One life of a work of `toy_runs` on what the folder holds.

        Args:
            work: name of the function.
            folder: it is given.
            how: ``after``: seconds until it is killed. ``dies_at``: number of the operation on
                the folder, from 1, before which it kills itself; with ``half``, a file that is
                about to be renamed loses its second half first, as if it died while it wrote.
                ``fails_from``: number of the operation from which all that need space or
                permission fail with the error ``code``. ``limit``: bytes beyond which the system
                lets no file grow.

        Returns:
            ``killed``, ``seconds``, and from a life that ended by itself ``operations`` and
            ``error``: the sentence of a UserError, all of another error, or None.
        """
        request = {"work": work, "folder": str(folder)} | how
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(command: list[str], *, background: bool, **options) -> subprocess.Popen:
    """A command as a terminal starts it or, deaf to Ctrl-C, as ``&`` in a script does.

    It leads a session of its own, and Python hears of Ctrl-C only if it did at its start.
    """
    how = signal.SIG_IGN if background else signal.SIG_DFL
    options |= dict(start_new_session=True, stderr=subprocess.PIPE)
    return subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, how), **options
    )


def wait_until(reached: Callable[[], object], seconds: float = 200) -> None:
    """Wait for something; an assertion fails if it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(process: int) -> bool:
    """Whether a process runs, or has ended and nobody knows of it yet."""
    return Path(f"/proc/{process}").exists()


def in_session(leader: int) -> bool:
    """Whether a process of the session that this one began is left, its own end included."""
    stats = (Path(f"/proc/{p}/stat") for p in os.listdir("/proc") if p.isdigit())
    texts = []
    for stat in stats:
        with contextlib.suppress(OSError):  # it ended meanwhile
            texts.append(stat.read_text())
    return any(int(text.rsplit(")", 1)[1].split()[3]) == leader for text in texts)


def serve() -> None:
    import toy_runs
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread
    toy_runs.warm()
    for line in sys.stdin:
        print(json.dumps(_life(**json.loads(line))), flush=True)


def _life(work: str, folder: str, after: float | None = None, **how) -> dict:
    import toy_runs

    read, write = os.pipe()
    start, child = time.monotonic(), os.fork()
    if not child:
        _quiet()
        told = _work(getattr(toy_runs, work), folder, **how)
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return {"killed": killed, "seconds": time.monotonic() - start} | json.loads(told or "{}")


def _quiet() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def _work(work, folder, dies_at=0, half=False, fails_from=0, code=0, limit=0) -> dict:
    import traceback

    from hallulib import UserError

    count, error = 0, None

    def watch(event, arguments):
        nonlocal count
        if not _changes(event, arguments, folder):
            return
        count += 1
        file = arguments[0]
        if count == dies_at:
            if half and event == "os.rename" and os.path.isfile(file):
                os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        needs = event in ("open", "os.rename") or event == "os.mkdir" and not os.path.isdir(file)
        if fails_from and count >= fails_from and needs:
            raise OSError(code, os.strerror(code), str(file))

    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.addaudithook(watch)  # before each operation
    try:
        work(Path(folder))
    except UserError as fault:
        error = str(fault)
    except BaseException:
        error = traceback.format_exc()
    return {"operations": count, "error": error}


def _changes(event, arguments, folder) -> bool:
    if event not in CHANGES or not str(arguments[0]).startswith(folder):
        return False
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    serve()
