"""
How a program begins and ends for the person at the command line: wrong arguments are one line, a
reader that leaves early (`| head`) ends it without a word, and so, but for a line, does Ctrl-C.
"""

import argparse
import os
import signal
import sys

from harness.settings import die, program


def parser(text):
    """An ArgumentParser whose help begins with `text`, a module's docstring, and whose errors are
    one line."""
    found = argparse.ArgumentParser(
        prog=program(),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.error = refuse
    return found


def refuse(message):
    die(f"{message}; --help lists the arguments")


def run(main, stopped="stopped"):
    """main(argv), as a whole program; `stopped` is what it says at Ctrl-C."""
    try:
        try:
            main(sys.argv[1:])
        finally:  # also of one that has left by SystemExit, as --help does
            sys.stdout.flush()
    except BrokenPipeError:
        # What the reader did not want is still in the buffer, which Python empties as it leaves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print(f"{program()}: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
