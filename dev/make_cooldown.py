#!/usr/bin/env python3
"""make_cooldown.py: the simple texts with which the training of the story model ends. Python's standard library only.

  python dev/make_cooldown.py text/train.txt tinystories_sample.txt.xz -o text/

train.txt is what dev/make_text.py wrote, so that nothing of the held-out books can come in. It is parted in:

  books.txt         all but the stories of the second file
  simple.txt        those chapters of the books that are in the simplest words
  stories.txt       the stories, --copies times
  stories_held.txt  --held-stories stories that are in none of these: whether the others are learnt by heart is seen on them

All are pieces in random order that <|endoftext|> ends, with nothing between it and the next, as a prompt has it. The
trainer draws its windows from all --data files alike, so a file's share of the bytes is its share of the training.

**The stories come many times,** and a model learns them by heart. So each copy has other names of people: a girl's name
becomes another girl's, everywhere in the story. What can still be learnt by heart is the plot; who is meant must be read.
With --things a fox may also become a rabbit, everywhere in the story, and glad happy, here or there.

**A book is cut into chapters or tales** at its headings, and the headings are left out. How simple a chapter is: the share
of its words that stand at least twice in the stories. The simplest come first, until there are --simple-bytes of them.
"""
import argparse
import collections
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from make_text import END_OF_TEXT, read

GIRLS = """Lily Mia Anna Sara Lucy Molly Sue Jane Jill Sally Jen Amy Mary Elly Emma Ella Emily Kate Alice Sophie Polly Grace
    Daisy Lila Jenny Sarah Rachel Mimi Lola Emmy Claire Gina Ann Millie Nora Rita Annie Chloe Bella Zoe Ruby Betty Becky
    Lizzie Susie Cindy Isabel Rosie Tilly Lulu Leticia Denise Kari Abigail Anny Lacy Lilly Milly Dorothy Meg Anne Diana
    Helen Fanny Dora Susan Heidi Rose Beth Ruth Nell Nancy Clara Laura Dolly Carol Tess Nina Nan""".split()
BOYS = """Ben Tom Tim Timmy Jack Sam Max Bob John Joe Tommy Benny Jimmy Billy Andy James Jake Leo Jim Ted Danny Pete Peter
    Charlie Charles Oliver Bill Mike Dave Stan George Paul Henry Ralph Fred Tony Freddy Thomas Josh Jerry Gary Alfie Percy
    Joey Bruce Robin Arthur Robert Roger Harry Edward Walter Ned Toby Jem Davy Colin Noah Luke Phil Alan Dick""".split()
# Things that can stand for each other: in a copy with --things one becomes another of its line, everywhere in the story.
THINGS = [line.split() for line in """dog cat rabbit fox puppy kitten squirrel mouse turtle pig goat lamb hedgehog
    bird owl butterfly crow robin|bear lion elephant tiger wolf|frog duck fish crab|doll robot puppet|car truck train bus
    kite balloon|scarf coat shirt jacket sweater|apple pear peach plum|cookie muffin cake pie sandwich|juice lemonade milk
    soup porridge stew|red blue green yellow purple pink brown|park playground garden meadow|forest jungle|lake pond river
    store shop market|hill mountain|stone rock pebble shell|box basket bag|stick branch|bike scooter|castle tower palace
    monster dragon giant ghost|coin button marble gem|drum flute violin guitar|cup bowl plate|chair bench stool
    mom mommy mum mama|dad daddy papa""".replace("|", "\n").split("\n")]
# Words that say nearly the same: in a copy with --things each may become another of its line, wherever it stands.
ALIKE = [line.strip().split("/") for line in """happy/glad|sad/unhappy|scared/afraid/frightened|big/large/huge
    small/tiny|started/began|wanted to/wished to|ran/rushed/hurried|lovely/beautiful|angry/mad|yummy/tasty/delicious
    shouted/yelled|smiled/grinned/beamed|saw/noticed/spotted|loved to/liked to|couldn't/could not|didn't/did not
    wasn't/was not|don't/do not|I'm/I am|it's/it is|very/really|lots of/a lot of|decided to/chose to
    from that day on/from then on|strange/odd/unusual|realized/understood|shiny/sparkly/bright|every day/each day
    noise/sound|kids/children|suddenly/all of a sudden|silly/foolish|grabbed/took|found/discovered
    walked/wandered|jumped/leapt|brave/bold""".replace("|", "\n").split("\n")]
KEEP = "bark meow woof sky grass leaves quack tweet chirp".split()    # with these a beast or a colour is one of its own
PERSON = re.compile(r"\b(" + "|".join(GIRLS + BOYS) + r")\b")
HEADING = re.compile(r"(?i:(?:the \w+ )?(?:chapter|part|book|stave|volume)\b)|[IVXLC]+\.?$|[IVXLC]+[.:]? ?-? ?[A-Z]"
                     r"|\d{1,3}\.?$|\d{1,3}[.:] ?-? ?[A-Z]|\d{1,3} - ")
SHORTEST = 250    # bytes of a piece; what is shorter between two headings is a motto or a date


def words(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def is_heading(paragraph):
    line = paragraph.strip()
    if "\n" in line or len(line) >= 80:
        return False
    return bool(HEADING.match(line)) or (line.isupper() and len(line) < 70 and not re.search(r'["!?]$|\*', line))


def chapters(book):
    parts = [[]]
    for paragraph in re.split(r"\n[ \t]*\n\s*", book.strip()):
        if is_heading(paragraph):
            parts.append([])
        else:
            parts[-1].append(paragraph.strip())
    texts = ["\n\n".join(part) for part in parts]
    return [text for text in texts if len(text) >= SHORTEST]


def story(text):
    """A blank line between paragraphs, one space between words, no words after the end."""
    paragraphs = [" ".join(line.split()) for line in text.split("\n")]
    if paragraphs:
        paragraphs[-1] = re.sub(r"\s*\b(the end|end of story)[.!]*$", "", paragraphs[-1], flags=re.I)
    return "\n\n".join(p for p in paragraphs if p and not re.fullmatch(r"(?i)(the end|end of story)\W*", p))


def with_other_names(text, draw):
    """Each name that text has becomes another of its kind; two people stay two."""
    mine = sorted(set(PERSON.findall(text)))
    new = {}
    for kind in GIRLS, BOYS:
        old = [name for name in mine if name in kind]
        new.update(zip(old, draw.sample(kind, len(old))))
    return PERSON.sub(lambda found: new[found.group()], text)


def plural(word):
    return {"mouse": "mice", "wolf": "wolves", "fish": "fish", "puppy": "puppies"}.get(
        word, word + ("es" if word[-1] in "xh" or word == "bus" else "s"))


def with_other_things(text, draw):
    """Things become others of their kind, the same ones everywhere; words become others that say nearly the same."""
    kept = {line[0] for line in THINGS if any(word in text for word in KEEP) and line[0] in ("dog", "bird", "frog", "red")}
    new = {}
    for line in THINGS:
        if line[0] not in kept:
            old = [word for word in line if re.search(rf"(?i)\b{word}(e?s)?\b", text)]
            for a, b in zip(old, draw.sample(line, len(old))):
                new.update({a: b, plural(a): plural(b)})
    alike = {word: line for line in ALIKE for word in line}

    def other(found):
        word = found.group()
        low = word if word.startswith("I") else word.lower()
        into = new.get(low) or (draw.choice(alike[low]) if low in alike and draw.random() < 0.6 else word)
        return into[0].upper() + into[1:] if word[0].isupper() else into

    every = sorted(list(new) + list(alike), key=len, reverse=True)
    text = re.sub(r"(?i)\b(?:" + "|".join(every) + r")\b", other, text)
    text = re.sub(r"\bat (?=the (?:garden|meadow|forest|jungle)\b)", "in ", text)
    text = re.sub(r"\b([Aa])n (?=[^aeiouAEIOU\W])(?!(?:hour|honest))", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeiouAEIO])(?!(?:uni|use|one|eu))", r"\1n ", text)


def write(folder, name, pieces):
    data = "".join(piece + END_OF_TEXT for piece in pieces).encode()
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data)
    print(f"{name}: {len(pieces)} pieces, {len(data):,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", metavar="train.txt", help="what dev/make_text.py wrote")
    parser.add_argument("stories", metavar="STORIES", help="the stories in it, .xz or plain")
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where the texts go (default here)")
    parser.add_argument("--copies", type=int, default=26, metavar="N", help="of the stories (default 26)")
    parser.add_argument("--simple-bytes", type=float, default=5e6, metavar="N",
                        help="chapters that count as simple (default 5e6)")
    parser.add_argument("--held-stories", type=int, default=48, metavar="N", help="default 48")
    parser.add_argument("--keep-names", action="store_true", help="copies of a story are the same")
    parser.add_argument("--things", action="store_true", help="each copy has other things and words of like meaning too")
    parser.add_argument("-s", "--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)

    stand = {" ".join(text.split()) for text in read(args.stories).split(END_OF_TEXT)}
    texts = [text for text in read(args.train).split(END_OF_TEXT) if text.strip()]
    books = [text for text in texts if " ".join(text.split()) not in stand]
    stories = [s for s in (story(t) for t in texts if " ".join(t.split()) in stand) if len(s) >= SHORTEST]
    draw.shuffle(stories)
    held, stories = stories[:args.held_stories], stories[args.held_stories:]

    count = collections.Counter(word for text in stories for word in words(text))
    known = {word for word, n in count.items() if n >= 2}
    pieces = [chapter for book in books for chapter in chapters(book)]

    def simplicity(piece):
        mine = words(piece)
        return sum(word in known for word in mine) / max(1, len(mine))

    simple, size = [], 0
    for piece in sorted(pieces, key=simplicity, reverse=True):
        if size >= args.simple_bytes:
            break
        simple.append(piece)
        size += len(piece.encode())
    print(f"{len(books)} books, {len(pieces)} chapters, {len(simple)} of them simple: {simplicity(simple[-1]):.3f} of the "
          f"words or more are among {len(known)}; {len(stories)} stories")

    copies = []
    for _ in range(args.copies):    # of whole passes, so that the first bytes of the file hold each story as often
        for text in draw.sample(stories, len(stories)):
            text = text if args.keep_names else with_other_names(text, draw)
            copies.append(with_other_things(text, draw) if args.things else text)
    draw.shuffle(simple)
    os.makedirs(args.output, exist_ok=True)
    write(args.output, "books.txt", [text.strip("\n") for text in books])
    write(args.output, "simple.txt", simple)
    write(args.output, "stories.txt", copies)
    write(args.output, "stories_held.txt", held)


if __name__ == "__main__":
    main()
