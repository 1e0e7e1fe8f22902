"""
Four rewards that teach nothing good, as they are written by mistake. What a run says of each stands
in docs/when-it-does-not-learn.md.

    python lad.py --config tiny --reward examples/broken_rewards.py:always
"""


def always(response, row):
    """Meant to ask whether the response is right, asks whether there is one."""
    return float(response is not None)


def never(response, row):
    """Compares a text with a number."""
    return float(response == row["answer"]["target"])


def blind(response, row):
    """Looks at the row, and not at the response."""
    return row["answer"]["target"] % 2


def short(response, row):
    """Punishes length and asks for nothing else: to everything the shortest response is best."""
    return 1 / (2 + len(response))
