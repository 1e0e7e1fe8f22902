r"""
Verifiable rewards for mathematical answers, programs and countdown puzzles: 1.0 or 0.0, in time,
and for a reason. And rewards of one's own, which may be any number.

    with Verifier(workers=8, timeout=10) as v:
        v.score([(kind, response, truth), ...])      # v.reasons then says of each zero why
    python verify.py FILE.jsonl                      # the same, as a command
    python verify.py --reward my_rewards.py:function FILE.jsonl

Kinds: math (the last \boxed{}), math:answer (the last "Answer:" line), math:number (the last
number), code (the last Python block), countdown: the preset chooses. The kind
"reward:/FILE.py:function" is a function (response, row) of one's own, with the row in place of the
truth: docs/rewards.md.

Reasons: "" (wrong), no answer found, too long, too large, timeout, crashed, truth unparsable; with
a colon ("timeout: worker replaced") they are the verifier's own failures.

How two answers are compared stands in harness/math_answers.py, what the program of a response is in
harness/fences.py, how it is run and judged in harness/programs.py and harness/sandbox.py, puzzles
in harness/countdown.py; all of it with examples in docs/verifiers.md. Work that is bounded is done
where the caller is, all else in processes that are killed when they are late.

Errors: ValueError for an unknown kind; RuntimeError where workers cannot start or code cannot be
run safely.
"""

import collections
import concurrent.futures
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # python -I and PYTHONSAFEPATH leave out a script's own folder
    sys.path.insert(0, str(HERE))

from harness import rewards  # noqa: E402
from harness.countdown import countdown_judge  # noqa: E402
from harness.math_answers import (  # noqa: E402
    Unjudged,
    after_thinking,
    find_answer,
    last_box,
    load_library,
    plain,
    same,
    same_number,
    squash,
    tidy,
)
from harness.programs import code_judge  # noqa: E402
from harness.sandbox import Sandbox, attempt  # noqa: E402
from harness.settings import die, one_line  # noqa: E402

# Truths hold integers of any length; what could take long is done in a worker, in bounded time
sys.set_int_max_str_digits(0)

__all__ = [
    "Verifier",
    "code_reward",
    "countdown_reward",
    "find_answer",
    "judge",
    "math_reward",
    "plain",
    "squash",
    "tidy",
]

# boxed is what math says by itself
KINDS = ("math", "math:boxed", "math:answer", "math:number", "code", "countdown")

# ==== 1. One item ===============================================================================


def math_judge(response, answer, style="boxed", quick=False):
    """(reward, reason). A list of truths holds alternatives; quick: None where plain numbers do not
    settle it."""
    # The truths, tidied; there has to be one
    truths = answer if isinstance(answer, (list, tuple)) else [answer]
    texts = [str(truth) for truth in truths if truth is not None]
    golds = [tidy(last_box(text) or text) for text in texts]
    golds = [gold for gold in golds if gold]
    if not golds:
        return 0.0, "truth unparsable"
    # The answer
    pred = find_answer(response, style)
    if not pred:
        return 0.0, "no answer found"
    if len(pred) > max(400, 2 * max(map(len, golds))):
        return 0.0, "too long"
    # In the caller: short plain numbers only
    if quick:
        return by_numbers(pred, golds)

    # Right where it is one of the truths
    pred = tidy(pred)
    reasons = []
    for gold in golds:
        try:
            if same(gold, pred):
                return 1.0, ""
        except Unjudged as why:
            reasons.append(str(why))
    # a wrong answer where any of the truths could be read
    all_unjudged = len(reasons) == len(golds)
    return 0.0, reasons[0] if all_unjudged else ""


def by_numbers(pred, golds):
    """(reward, reason) of a short plain number, where all truths are plain numbers too; else None.
    It says what `same` would."""
    if len(pred) > 60:
        return None
    written = tidy(pred)
    bare = written.removesuffix("\\text{dollar}")
    number = plain(bare)
    truths = [plain(gold) for gold in golds]
    if not number or not all(truths):
        return None
    is_share = any(percent for _, _, percent in truths)
    if is_share and bare != written:  # dollars are no share: not as simple
        return None
    right = any(same_number(truth, number) for truth in truths)
    return float(right), ""


def judge(kind, response, truth, sandbox=None, timeout=None, quick=False):
    """(reward, reason), here and now; with quick, None where it is work for a worker. ValueError:
    an unknown kind."""
    if kind.startswith(rewards.PREFIX) and quick:
        return None
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    name, _, style = kind.partition(":")
    if name == "countdown":
        return attempt(countdown_judge, response, truth) or (0.0, "truth unparsable")
    if name == "math":
        return math_judge(response, truth, style or "boxed", quick)
    if quick:
        return None
    return code_judge(after_thinking(response), truth, sandbox, timeout)


# ==== 2. A worker ===============================================================================


def worker_main(role, timeout, mode):
    """Answer each JSON line with [reward, reason]; ends when the parent closes the pipe or dies,
    hung or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    timeout = float(timeout)
    # The pipes of items and of replies, which nothing else reads or writes
    items = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply

    # What the work needs, before the first item
    sandbox = None
    function = None
    ready = ["", ""]
    try:
        if role.startswith(rewards.PREFIX):
            name = role.removeprefix(rewards.PREFIX)
            function = rewards.load(name, json.loads(items.readline()))
        elif role == "code":
            sandbox = Sandbox(mode)
            ready = [sandbox.mode, sandbox.why]
        else:
            load_library()
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            same("x+1", "1+x")  # what the first item would wait for
    except (OSError, ValueError) as error:
        print(json.dumps(["refused", str(error)]), file=reply)
        return
    print(json.dumps(["ready", ready]), file=reply)

    os.dup2(1, 2)  # from here on nothing of an item reaches the caller's log
    for line in items:
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)  # the kernel ends an orphan that hangs
        try:
            kind, response, truth = json.loads(line)
            if function:
                result = rewards.score(name, function, response, truth)
            else:
                result = judge(kind, response, truth, sandbox, timeout)
        except Exception as error:
            result = 0.0, rewards.shown(f"crashed: {type(error).__name__}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), file=reply)


def ask(worker, line, seconds):
    """A worker's answer to a line. TimeoutError when it is late, BrokenPipeError where it died."""
    worker.stdin.write(line)
    worker.stdin.flush()
    if not select.select([worker.stdout], [], [], seconds)[0]:
        raise TimeoutError
    answer = worker.stdout.readline()
    if not answer.endswith("\n"):
        raise BrokenPipeError
    return json.loads(answer)


def kill(worker):
    """End it and what it has started, whatever they are doing, and wait for it."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)  # the session that it was started in is its own
    except (ProcessLookupError, PermissionError):
        worker.kill()
    worker.wait()


def end(worker):
    """Kill it, and close its pipes."""
    kill(worker)
    worker.stdout.close()
    try:
        worker.stdin.close()
    except OSError:  # a line for it was still on its way
        pass


# ==== 3. The pool ===============================================================================


class Verifier:
    """Workers that can be killed: one for each thread of a pool, which waits for it.

    sandbox: "auto", "namespaces", "landlock", or "unsafe" for limits of resources only. Every item
    gets its reward within its timeout plus 0.5 s. Raises what the top of this file says.
    """

    warned = ""  # the mode that was warned of: once a process

    def __init__(self, workers=2, timeout=10.0, sandbox="auto"):
        self.timeout = timeout
        self.sandbox = sandbox
        self.live = set()  # the workers that run
        self.mine = threading.local()  # a thread's own worker, by its role
        self.sources = {}  # the text of the file of each reward, read once
        self.results = []  # of the items under way: a verdict or its future
        self.reasons = []
        self.pool = concurrent.futures.ThreadPoolExecutor(workers)
        self.front = concurrent.futures.ThreadPoolExecutor(1)  # hands out

    def submit(self, items):
        """A future of [(reward, reason)] of items (kind, response, truth), while the caller goes
        on."""
        return self.front.submit(self.judge_all, items)

    def judge_all(self, items):
        """Bounded items are scored here; the workers begin with the others, which are then waited
        for."""
        self.results = [
            judge(*item, quick=True) or self.pool.submit(self.give, item) for item in items
        ]
        return [result if isinstance(result, tuple) else result.result() for result in self.results]

    def score(self, items):
        """The rewards in order; .reasons stand beside them."""
        verdicts = self.submit(items).result()
        self.reasons = [reason for _, reason in verdicts]
        return [reward for reward, _ in verdicts]

    def give(self, item):
        """In a thread: to its worker, which is killed when it is late and started when needed."""
        # To the worker of this thread
        role = item[0]
        if not role.startswith(rewards.PREFIX):
            role = role.partition(":")[0]
        worker = getattr(self.mine, role, None) or self.spawn(role)
        line = json.dumps(item, default=str) + "\n"
        seconds = self.timeout
        if role == "code":
            seconds += 0.25  # it keeps its time itself
        # Its answer, or its end
        try:
            return tuple(ask(worker, line, seconds))
        except TimeoutError:
            reason = "timeout: worker replaced"
        except OSError:
            reason = "crashed: worker replaced"
        end(worker)
        self.live.discard(worker)
        delattr(self.mine, role)
        return 0.0, reason

    def spawn(self, role):
        """A worker in its own session; it imports this file alone, never the caller's main module
        or torch."""
        own = role.startswith(rewards.PREFIX)
        # An environment that neither changes Python nor hash orders
        env = {}
        for key, value in os.environ.items():
            if own or not key.startswith(("PYTHON", "LD_")):
                env[key] = value
        env |= {"SYMPY_GROUND_TYPES": "python"}  # gmpy2 would not be interrupted
        env |= {"PYTHONHASHSEED": "0"}
        if own:  # cores are shared with the other workers, GPUs are the trainer's
            env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, os.path.abspath(__file__), "--worker", role]
        command += [str(self.timeout), self.sandbox]
        # In a session of its own
        worker = subprocess.Popen(
            command,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.live.add(worker)
        # What it says when it is ready
        first, seconds = "", 60
        if own:
            first, seconds = self.source_of(role), rewards.LOADING
        state, said = attempt(ask, worker, first, seconds) or ("dead", "")
        if state != "ready":
            end(worker)
            self.live.discard(worker)
        if own and state == "refused":
            raise RuntimeError(said)
        if own and state == "dead":
            raise RuntimeError(f"{role}: importing it ended the process, or took {seconds} s")
        if state == "dead":
            raise RuntimeError("a verifier worker cannot start; to see why: " + " ".join(command))
        if state == "refused":
            raise RuntimeError(
                f'code cannot be run safely here ({said}); sandbox="unsafe" runs it all the same, '
                "with resource limits only"
            )
        self.warn(*said)
        setattr(self.mine, role, worker)
        return worker

    def source_of(self, role):
        """The line that a worker of a reward begins with: the text of its file, as it was when the
        first worker was started."""
        if role not in self.sources:
            path, _ = rewards.split(role.removeprefix(rewards.PREFIX))
            try:
                self.sources[role] = json.dumps(rewards.read(path)) + "\n"
            except ValueError as error:
                raise RuntimeError(str(error)) from None
        return self.sources[role]

    def warn(self, mode, why):
        """Once, where programs run under less than namespaces."""
        if mode in ("", "namespaces", Verifier.warned):
            return
        Verifier.warned = mode
        because = f", because {why}" if why else ""
        print(f"verify: warning: programs run under {mode}{because}", file=sys.stderr)

    def close(self):
        """End the workers, whatever they are doing."""
        self.front.shutdown(wait=False, cancel_futures=True)
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.live):
            kill(worker)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


# ==== 4. One function a kind, and the command ===================================================

ONE = Verifier(workers=1)


def math_reward(response, answer):
    """1.0 where the last box holds the answer, as harness/math_answers.py compares them;
    RuntimeError without a worker."""
    return ONE.score([("math", response, answer)])[0]


def code_reward(response, tests):
    """1.0 where the last Python block passes all tests, as harness/programs.py reads them;
    RuntimeError where that is not safe."""
    return ONE.score([("code", response, tests)])[0]


def countdown_reward(response, puzzle):
    """1.0 where the numbers, each used once by + - * /, make the target. No other operator is
    covered."""
    return ONE.score([("countdown", response, puzzle)])[0]


def progress(verifier, verdicts, total):
    """A bar on stderr until all verdicts are in."""
    while not verdicts.done():
        done = 0
        for result in verifier.results:
            done += isinstance(result, tuple) or result.done()
        bar = "#" * (40 * done // total)
        print(f"\r{done:>7}/{total} [{bar:40}]", end="", file=sys.stderr)
        time.sleep(0.1)


def read_items(path, own=False):
    """The rows of a JSONL file; one line of error where they cannot be items. own: for a reward of
    one's own, which needs a response and whatever it reads."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        die(f"{path}: {one_line(error)}")

    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            die(f"{where}: not JSON ({one_line(error)})")
        needed = ("response",) if own else ("kind", "response", "truth")
        if not isinstance(row, dict) or not set(needed) <= row.keys():
            keys = ", ".join(f'"{key}": ...' for key in needed)
            die(f"{where}: an item is {{{keys}}}")
        if not own and row["kind"] not in KINDS:
            die(f"{where}: kind {row['kind']!r}; there are {', '.join(KINDS)}")
        if not isinstance(row["response"], str):
            die(f"{where}: the response has to be a string")
        rows.append(row)
    if not rows:
        die(f"{path} has no items")
    return rows


def items_of(rows, reward):
    """(kind, response, truth) of each row; with a reward of one's own its name and the row."""
    if not reward:
        return [(row["kind"], row["response"], row["truth"]) for row in rows]
    try:
        kind = rewards.PREFIX + rewards.find(reward)
    except ValueError as error:
        die(error)
    return [(kind, row["response"], row) for row in rows]


def main(argv):
    """A line of output an item, then how many were right and why the others were not. Where a row
    has "want", the reward that it should get, exit code 1 says that one did not get it."""
    from harness import command

    parser = command.parser(__doc__)
    parser.add_argument("file", help="JSONL, a line an item; docs/verifiers.md has examples")
    parser.add_argument("--reward", default="", metavar="FILE.py:function", help="docs/rewards.md")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for an item (10)")
    args = parser.parse_args(argv)
    rows = read_items(args.file, own=bool(args.reward))
    items = items_of(rows, args.reward)

    start = time.monotonic()
    with Verifier(os.cpu_count(), args.timeout) as verifier:
        verdicts = verifier.submit(items)
        progress(verifier, verdicts, len(items))
        try:
            results = verdicts.result()
        except RuntimeError as error:
            print(file=sys.stderr)  # the bar's line
            die(one_line(error))
    seconds = time.monotonic() - start

    # A line an item
    right = total = unwanted = 0
    why = collections.Counter()
    for number, (row, (reward, reason)) in enumerate(zip(rows, results, strict=True)):
        name = args.reward.rpartition(":")[2] or row["kind"]
        line = f"{number:>7} {name:<12} {reward:g} {reason}"
        if row.get("want", reward) != reward:
            unwanted += 1
            line += "  <- wanted " + rewards.shown(str(row["want"]))
        print(line)
        right += reward > 0.5
        total += reward
        if reward <= 0.5:
            why[reason or "wrong"] += 1

    # Their sum
    said = [f"{len(items)} items, {right} right, {len(items) / seconds:.0f} a second"]
    if args.reward:
        said.append(f"mean reward {total / len(items):g}, right is over 0.5")
    said += [f"{count} {reason}" for reason, count in why.most_common()]
    if any("want" in row for row in rows):
        said.append(f"{unwanted} not as wanted")
    print("\n" + "; ".join(said), file=sys.stderr)
    if unwanted:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker_main(*sys.argv[2:])
    else:
        from harness import command

        command.run(main)
