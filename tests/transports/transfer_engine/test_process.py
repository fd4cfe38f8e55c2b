"""The effects of an engine on its process: when it ends, after `os.fork()`, and on its terminal."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from engine_seeds import SOON, needs_mooncake, silent_engine

from tensorfork.transports.transfer_engine.export import Offer

pytestmark = needs_mooncake
SUPPORT = Path(__file__).parents[2] / "support"


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can use the names of `engine_seeds` and of the tests over TCP."""
    head = f"""
        import os, sys, threading, time
        sys.path[:0] = {[os.path.dirname(__file__), str(SUPPORT)]!r}
        import tensorfork, torch
        import test_tcp as over_tcp
        from engine_seeds import *
        from tensorfork.transports.transfer_engine import engine
        from tensorfork.transports.transfer_engine.handshake import Handshake
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(program), *args],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )


def test_nothing_reaches_the_terminal_even_when_a_read_is_refused() -> None:
    ended = run(
        """
        with tensorfork.publish(tensors(2, 1000), transports=OFFERED) as seed:
            tensorfork.fork_into(empty(2, 1000), seed.address, transport="transfer_engine:tcp")
        over_tcp.test_memory_that_is_not_registered_any_more_is_refused_and_the_engine_is_used_again()
        print("fine")
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")


def test_python_ends_while_one_thread_reads_and_another_waits_for_a_silent_seed() -> None:
    with silent_engine() as offer:
        ended = run(
            """
            memory, reading = torch.zeros(2, dtype=torch.uint8), threading.Event()
            region = tensorfork.Region(0, memory.data_ptr(), 1, "cpu", memory)
            used = engine.get_engine("tcp", "127.0.0.1")
            itself = f"127.0.0.1:{used.port}"
            registered = used.registrations.acquire([region], time.monotonic() + SOON)

            def read():
                while True:
                    transfer_id = used.start_read(itself, region.address + 1, region.address, 1, "cpu", 1e9)
                    while used.status(transfer_id) is engine.ReadStatus.RUNNING:
                        reading.set()

            threading.excepthook = lambda args: None  # the thread gets an error when the process ends
            threading.Thread(target=read, daemon=True).start()
            assert reading.wait(60)
            other = engine.Engine("tcp", "127.0.0.1", ())
            try:
                first_read = lambda connected: other.start_read(f"127.0.0.1:{sys.argv[1]}", 0, 0, 1, "cpu", 1e9)
                Handshake(other, first_read).wait_connected(0)
            except tensorfork.TransferFailed:
                os.write(1, b"ending")
            """,
            str(Offer.unpack(offer).port),
        )
    assert (ended.returncode, ended.stdout) == (0, "ending"), ended.stderr


def test_an_engine_is_not_used_in_a_forked_process() -> None:
    ended = run(
        """
        seed = tensorfork.publish(tensors(1, 1000), transports=OFFERED)
        tensorfork.fork_into(empty(1, 1000), seed.address, transport="transfer_engine:tcp")
        before = engine.get_engine("tcp", "127.0.0.1")
        child = os.fork()
        if not child:
            fresh = engine.get_engine("tcp", "127.0.0.1")
            try:
                before.start_read("127.0.0.1:1", 0, 0, 1, "cpu", time.monotonic() + 1)
            except tensorfork.TransferFailed as error:
                print(fresh is not before, "os.fork" in str(error), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tensorfork.fork_into(empty(1, 1000), seed.address, transport="transfer_engine:tcp")
        seed.close()
        """
    )
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr
