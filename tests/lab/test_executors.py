import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tethertune.lab.executors import EXECUTORS


@pytest.mark.parametrize("name", EXECUTORS)
def test_results_come_back(name):
    with EXECUTORS[name](2) as pool:
        assert [future.result() for future in [pool.submit(divmod, 7, n) for n in (2, 3)]] == [(3, 1), (2, 1)]


@pytest.mark.parametrize("name", EXECUTORS)
def test_errors_come_back_where_the_result_is_asked_for(name):
    with EXECUTORS[name](1) as pool:
        future = pool.submit(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            future.result()


def test_processes_end_with_the_one_that_made_them_even_if_it_is_killed():
    code = (
        "import os, time\n"
        "from tethertune.lab.executors import processes\n"
        "if __name__ == '__main__':\n"
        "    pool = processes(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not is_alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by 10 seconds")


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
