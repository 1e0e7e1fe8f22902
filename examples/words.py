"""
A reward of one's own, and its data: a sentence of exactly four words that has a given noun in it.

    python lad.py --config smol     # --data, --eval_data and --reward are functions of this file

It is a task for a small model that can write: `horse` is right with `My horse eats apples.`, and
with any other four different words, whatever they mean. Two sentences count as different answers
when they differ in a letter.
"""

import re

LENGTH = 4  # words of a sentence


def reward(response, row):
    """1 for a sentence of LENGTH different words, the row's among them; else 0."""
    if not re.fullmatch(r"[A-Z][a-z]*(,? [A-Za-z][a-z]*)*[.!?]", response.strip()):
        return 0.0, "no sentence"
    words = re.findall(r"[a-z]+", response.lower())
    if len(words) != LENGTH:
        return 0.0, "too long or too short"
    if row["word"] not in words:
        return 0.0, "without the word"
    if len(set(words)) < LENGTH:
        return 0.0, "a word twice"
    return 1.0


# ==== Its data ==================================================================================

# With its examples a prompt has 65 to 67 tokens. vLLM computes whole blocks of 32 once for all
# responses to a prompt, and on a CPU the rest for each: of 55 tokens that was most of its work
ASKED = "Write a sentence of exactly four words, with the word that you are given."
SHOWN = {"horse": "My horse eats apples.", "window": "She cleaned every window."}

NOUNS = """
ant apple arm army arrow baby bag ball bank basket bath beach bear bed bee bell bird blanket boat
body bone book boot bottle bowl box boy branch bread bridge brother bus cake camera candle car
card cat chair cheese child church circle city clock cloud coat coffee cousin cow cup dance day
desert desk doctor dog door dress egg engine eye family farm farmer father fence field finger fire
fish flag floor flower food foot forest friend fruit game garden ghost gift girl glass gold grass
hair hand hat head heart hill house ice island key king kitchen knife ladder lake lamp leaf leg
letter library light lion machine man map market meal milk mirror money moon mother mountain mouse
mouth music name needle night nose ocean oil orange page paint paper park party pen pencil phone
picture pillow plane plant plate pocket pond prince queen rabbit rain ring river road roof room
rope rose school sea seed ship shirt shoe shop sister sky snow soldier song soup star stone storm
story street student sugar sun table teacher tooth tower town train tree truck uncle village voice
wall watch water wind
""".split()


def row(word):
    """The task, two examples of it and the word, as a chat."""
    messages = [dict(role="system", content=ASKED)]
    for noun, sentence in SHOWN.items():
        messages.append(dict(role="user", content=noun))
        messages.append(dict(role="assistant", content=sentence))
    messages.append(dict(role="user", content=word))
    return dict(messages=messages, word=word)


def train():
    """The nouns to train on."""
    return [row(word) for number, word in enumerate(NOUNS) if number % 4]


def test():
    """Every fourth noun, which is held out."""
    return [row(word) for word in NOUNS[::4]]
