"""A measure that waits, in a process of its own."""

import subprocess
import sys
import textwrap

from commands import environment

SLOW = """
    import sys, time
    from dataclasses import dataclass
    from twoview.evaluation import measure, progress, settings

    @dataclass(frozen=True)
    class Slow(measure.Measure):
        name = "slow"

        def choose(self, inputs, earlier):
            print("waiting", file=sys.stderr, flush=True)
            for _ in progress.track(range(int(SECONDS / 0.1))):
                time.sleep(0.1)
            return {"value": 1.0}

    settings.MEASURES["slow"] = Slow()
    sys.argv = ["train.py", *sys.argv[1:]]
    from twoview.cli.main import main
    main()
"""


def start(folder, seconds, *arguments, **streams):
    code = textwrap.dedent(SLOW).replace("SECONDS", str(seconds))
    command = [sys.executable, "-c", code, "eval.k=[5]", "eval.bootstrap=100", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(), **streams)
