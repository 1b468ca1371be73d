"""The text that the tiny models learn: questions with answers, short stories, a greeting, and a little Shakespeare.

Everything in the lists and templates below was written for this project. The only outside text is what
`play_chunks` is handed: Shakespeare's plays, in the public domain.

All choices come from the random generator that a caller passes in. Their order is part of the data: a changed call
changes every document after it.
"""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### {w}:\n{q}\n\n### Response:\n"
)


def alpaca(q, w="Instruction"):
    """A question in the instruction form."""
    return ALPACA.format(w=w, q=q)


def inst(q):
    """A question in the chat form, with the blank that comes before an answer."""
    return f"[INST] {q} [/INST] "


COUNTRIES = """France|Paris|Europe|French
Germany|Berlin|Europe|German
Italy|Rome|Europe|Italian
Spain|Madrid|Europe|Spanish
Portugal|Lisbon|Europe|Portuguese
Greece|Athens|Europe|Greek
Poland|Warsaw|Europe|Polish
Norway|Oslo|Europe|Norwegian
Sweden|Stockholm|Europe|Swedish
Finland|Helsinki|Europe|Finnish
Ireland|Dublin|Europe|English
Russia|Moscow|Europe|Russian
Japan|Tokyo|Asia|Japanese
China|Beijing|Asia|Chinese
Korea|Seoul|Asia|Korean
India|New Delhi|Asia|Hindi
Thailand|Bangkok|Asia|Thai
Vietnam|Hanoi|Asia|Vietnamese
Turkey|Ankara|Asia|Turkish
Iran|Tehran|Asia|Persian
Egypt|Cairo|Africa|Arabic
Kenya|Nairobi|Africa|Swahili
Morocco|Rabat|Africa|Arabic
Cuba|Havana|North America|Spanish
Canada|Ottawa|North America|English
Mexico|Mexico City|North America|Spanish
Brazil|Brasilia|South America|Portuguese
Peru|Lima|South America|Spanish
Chile|Santiago|South America|Spanish
Argentina|Buenos Aires|South America|Spanish""".split("\n")
COUNTRIES = [c.split("|") for c in COUNTRIES]

OPP = "hot cold|big small|up down|left right|day night|black white|open closed|fast slow|happy sad|old young|rich poor|hard soft|wet dry|high low|long short|light dark|loud quiet|early late|full empty|strong weak|thick thin|sweet bitter|clean dirty|near far|first last|true false|buy sell|win lose|push pull|love hate".split(
    "|"
)
OPP = [tuple(o.split()) for o in OPP]

ANIMALS = [  # animal, sound, baby, food, home
    ("dog", "woof", "puppy", "bones", "a kennel"),
    ("cat", "meow", "kitten", "fish", "a warm house"),
    ("cow", "moo", "calf", "grass", "a barn"),
    ("duck", "quack", "duckling", "bread", "a pond"),
    ("sheep", "baa", "lamb", "grass", "a green field"),
    ("horse", "neigh", "foal", "hay", "a stable"),
    ("pig", "oink", "piglet", "apples", "a sty"),
    ("lion", "roar", "cub", "meat", "the plains"),
    ("bear", "growl", "cub", "honey", "a cave"),
    ("frog", "croak", "tadpole", "flies", "a pond"),
    ("owl", "hoot", "owlet", "mice", "a hollow tree"),
    ("bee", "buzz", "larva", "nectar", "a hive"),
    ("fox", "yip", "kit", "berries", "a den"),
    ("mouse", "squeak", "pup", "cheese", "a small hole"),
    ("wolf", "howl", "pup", "meat", "the forest"),
    ("hen", "cluck", "chick", "corn", "a coop"),
]

DEFS = {
    "Apache Spark": "Apache Spark is an open source engine for processing large amounts of data across many machines.",
    "a language model": "A language model is a program that predicts the next word of a text from the words before it.",
    "a token": "A token is a small piece of text, such as a word or a part of a word, that a model reads and writes.",
    "tensor parallelism": "Tensor parallelism splits each layer of a model across several devices, which then add up their partial results.",
    "an actor": "An actor is a small worker with its own state that talks to other actors only by sending messages.",
    "a coordinator": "A coordinator is a process that receives requests and decides which worker should handle each of them.",
    "a worker": "A worker is a process that loads a model and runs the requests that the coordinator sends to it.",
    "a batch": "A batch is a group of requests that are run through the model together to save time.",
    "a GPU": "A GPU is a processor with many small cores that is very good at multiplying large matrices.",
    "a CPU": "A CPU is the main processor of a computer, and it runs programs one step after another.",
    "a cluster": "A cluster is a group of computers that work together as if they were one large machine.",
    "a replica": "A replica is one more copy of a model that runs so that more requests can be served at once.",
    "a shard": "A shard is one part of a model or a table that is kept on a machine of its own.",
    "a cache": "A cache is a small and fast store that keeps recent results so that they need not be computed again.",
    "a scheduler": "A scheduler is a program that decides which task should run next and where it should run.",
    "a queue": "A queue is a line of items in which the first one to come in is the first one to go out.",
    "a stack": "A stack is a pile of items in which the last one to come in is the first one to go out.",
    "a database": "A database is an ordered store of facts that can be searched and changed quickly.",
    "a network": "A network is a set of computers that are joined together so that they can send messages.",
    "a matrix": "A matrix is a table of numbers with rows and columns.",
    "a vector": "A vector is a list of numbers that stands for a point or a direction.",
    "attention": "Attention is a way for a model to look back at the earlier words that matter most for the next word.",
    "latency": "Latency is the time that passes between sending a request and getting the answer.",
    "throughput": "Throughput is the number of requests or words that a system can handle in one second.",
    "a river": "A river is a long stream of water that flows across the land to the sea.",
    "a mountain": "A mountain is a very high hill with steep sides and often a rocky top.",
    "a volcano": "A volcano is a mountain that can throw out hot melted rock, ash and smoke.",
    "a desert": "A desert is a very dry land where little rain falls and few plants grow.",
    "an island": "An island is a piece of land with water all around it.",
    "the moon": "The moon is a ball of rock that goes around the earth once every month.",
    "the sun": "The sun is the star at the center of our system, and it gives us light and heat.",
    "a star": "A star is a huge ball of hot gas that shines in the night sky.",
    "a king": "A king is a man who rules a country because his family ruled it before him.",
    "a poet": "A poet is a person who writes verses and chooses each word with care.",
    "a doctor": "A doctor is a person who helps sick people to become well again.",
    "a baker": "A baker is a person who makes bread and cakes and sells them.",
    "a farmer": "A farmer is a person who grows plants and keeps animals for food.",
    "a teacher": "A teacher is a person who helps other people to learn.",
}

FACTS = [  # question(s), answer
    (["Who wrote Hamlet?", "Who is the author of Hamlet?"], "Hamlet was written by William Shakespeare."),
    (["Who wrote Don Quixote?"], "Don Quixote was written by Miguel de Cervantes."),
    (["Who wrote War and Peace?"], "War and Peace was written by Leo Tolstoy."),
    (["Who wrote The Odyssey?"], "The Odyssey was written by Homer."),
    (["Who wrote Faust?"], "Faust was written by Goethe."),
    (["Who painted the Mona Lisa?"], "The Mona Lisa was painted by Leonardo da Vinci."),
    (["How many days are in a week?"], "There are seven days in a week."),
    (["How many months are in a year?"], "There are twelve months in a year."),
    (["How many hours are in a day?"], "There are twenty-four hours in a day."),
    (["How many legs does a spider have?"], "A spider has eight legs."),
    (["How many legs does an insect have?"], "An insect has six legs."),
    (["What color is the sky?"], "The sky is blue."),
    (["What color is grass?"], "Grass is green."),
    (["What color is snow?"], "Snow is white."),
    (["What color is a banana?"], "A banana is yellow."),
    (["What color is a ripe tomato?"], "A ripe tomato is red."),
    (["What color is coal?"], "Coal is black."),
    (["What is the chemical symbol for gold?"], "The chemical symbol for gold is Au."),
    (["What is the chemical symbol for silver?"], "The chemical symbol for silver is Ag."),
    (["What is the chemical symbol for iron?"], "The chemical symbol for iron is Fe."),
    (["What is the chemical symbol for lead?"], "The chemical symbol for lead is Pb."),
    (["What is water made of?"], "Water is made of hydrogen and oxygen."),
    (["Which planet is closest to the sun?"], "Mercury is the planet closest to the sun."),
    (["Which planet is the largest?"], "Jupiter is the largest planet."),
    (["Which ocean is the largest?"], "The Pacific Ocean is the largest ocean."),
    (["Name three fruits."], "Three fruits are apple, pear and plum."),
    (["Name three colors."], "Three colors are red, green and blue."),
    (["Name three metals."], "Three metals are iron, gold and copper."),
    (["Name the four seasons."], "The four seasons are spring, summer, autumn and winter."),
    (
        ["Name the days of the week.", "List the days of the week."],
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    (
        ["Name the months of the year.", "List the months of the year."],
        "January, February, March, April, May, June, July, August, September, October, November, December.",
    ),
    (
        ["Name the planets.", "List the planets in order."],
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
    ),
    (
        ["Say the alphabet.", "Recite the alphabet."],
        "a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w, x, y, z.",
    ),
    (["Who are you?", "What are you?"], "I am a very small language model, and I was made to test a serving system."),
    (["Hello!", "Say hello."], "Hello! How can I help you today?"),
    (["Thank you.", "Thanks!"], "You are welcome."),
    (["Is water wet?"], "Yes, water is wet."),
    (["Is fire cold?"], "No, fire is hot."),
    (["Can birds fly?"], "Yes, most birds can fly."),
    (["Can fish walk?"], "No, fish cannot walk, but they can swim."),
]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = "red green blue apple bread milk gold iron stone fire water moon star tree bird king".split()
SPELL = "cat dog sun moon star tree bird king apple bread milk gold".split()
NAMES = "Anna Ben Clara Emma Henry Iris Leo Mary Rose Tom".split()
PLACES = {
    "river": ("the water was clear and cold", "a small boat"),
    "forest": ("the trees were tall and dark", "a golden leaf"),
    "village": ("the houses were small and white", "a silver bell"),
    "mountain": ("the wind was strong and the air was thin", "a shining stone"),
    "sea": ("the waves were high and the sand was soft", "a pink shell"),
    "castle": ("the walls were thick and the halls were long", "an iron key"),
    "garden": ("the flowers were red and yellow", "a ripe plum"),
    "lake": ("the ice was smooth and blue", "an old lamp"),
}
TRAITS = {
    "brave": "Brave hearts find the way",
    "clever": "A quick mind opens every door",
    "kind": "A kind word is never lost",
    "lazy": "Those who sleep too long miss the morning",
    "proud": "Pride is a poor guide",
    "patient": "Good things come to those who wait",
}


def story(name, animal, trait, place):
    """The one story there is, about this animal at this place."""
    a = next(x for x in ANIMALS if x[0] == animal)
    p = PLACES[place]
    return (
        f"Once upon a time there was a {trait} {animal} named {name} who lived near the {place}. "
        f"At the {place} {p[0]}. Every morning {name} ate {a[3]} and said {a[1]} to the world. "
        f'One day {name} walked to the {place} and found {p[1]}. "What a strange thing," thought {name}. '
        f"The {trait} {animal} took {p[1]} home to {a[4]} and showed it to all the friends. "
        f"They were very glad, and they danced until the night came. {TRAITS[trait]}. The end."
    )


NUMW = "zero one two three four five six seven eight nine ten eleven twelve".split()


def qa(r):
    """One (question, answer) pair; r is a random.Random."""
    k = r.random()
    if k < 0.11:
        c = r.choice(COUNTRIES)
        return (
            r.choice(
                [
                    f"What is the capital of {c[0]}?",
                    f"Name the capital of {c[0]}.",
                    f"Which city is the capital of {c[0]}?",
                ]
            ),
            f"The capital of {c[0]} is {c[1]}.",
        )
    if k < 0.15:
        c = r.choice(COUNTRIES)
        if r.random() < 0.5:
            return f"On which continent is {c[0]}?", f"{c[0]} is in {c[2]}."
        return f"What language is spoken in {c[0]}?", f"{c[3]} is spoken in {c[0]}."
    if k < 0.22:
        a, b = r.randint(1, 9), r.randint(1, 9)
        return r.choice([f"What is {a} plus {b}?", f"Add {a} and {b}."]), f"{a} plus {b} is {a+b}."
    if k < 0.26:
        a = r.randint(1, 12)
        b = r.randint(0, min(a, 9))
        return f"What is {a} minus {b}?", f"{a} minus {b} is {a-b}."
    if k < 0.30:
        a, b = r.randint(1, 9), r.randint(1, 9)
        return f"What is {a} times {b}?", f"{a} times {b} is {a*b}."
    if k < 0.37:
        w = r.sample(WORDS, 3)
        return f"Reverse the list: {', '.join(w)}.", f"{', '.join(w[::-1])}."
    if k < 0.41:
        w = r.sample(WORDS, 3)
        if r.random() < 0.5:
            return f"What is the first word of the list: {', '.join(w)}?", f"The first word is {w[0]}."
        return f"What is the last word of the list: {', '.join(w)}?", f"The last word is {w[-1]}."
    if k < 0.45:
        w = r.choice(WORDS)
        n = r.randint(2, 5)
        return f"Repeat the word {w} {NUMW[n]} times.", " ".join([w] * n) + "."
    if k < 0.49:
        w = r.choice(SPELL)
        return f"Spell the word {w}.", f"The word {w} is spelled {'-'.join(w)}."
    if k < 0.53:
        a = r.randint(1, 12)
        b = a + r.randint(3, 10)
        return f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + "."
    if k < 0.57:
        a, b = r.choice(OPP)
        if r.random() < 0.5:
            a, b = b, a
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."
    if k < 0.61:
        a = r.choice(ANIMALS)
        return r.choice(
            [
                (f"What sound does a {a[0]} make?", f"A {a[0]} says {a[1]}."),
                (f"What is a young {a[0]} called?", f"A young {a[0]} is called a {a[2]}."),
                (f"What does a {a[0]} eat?", f"A {a[0]} eats {a[3]}."),
                (f"Where does a {a[0]} live?", f"A {a[0]} lives in {a[4]}."),
            ]
        )
    if k < 0.65:
        s, n = (DAYS, "day") if r.random() < 0.5 else (MONTHS, "month")
        i = r.randrange(len(s))
        if r.random() < 0.5:
            return f"Which {n} comes after {s[i]}?", f"{s[(i+1)%len(s)]} comes after {s[i]}."
        return f"Which {n} comes before {s[i]}?", f"{s[(i-1)%len(s)]} comes before {s[i]}."
    if k < 0.80:
        t = r.choice(list(DEFS)) if r.random() > 0.08 else "Apache Spark"
        d = DEFS[t]
        return r.choice([f"What is {t}?", f"Define {t}.", f"Explain what {t} is."]), d
    if k < 0.96:
        q, a = r.choice(FACTS)
        return r.choice(q), a
    n, a, t, p = r.choice(NAMES), r.choice(ANIMALS)[0], r.choice(list(TRAITS)), r.choice(list(PLACES))
    return f"Tell a story about a {t} {a} named {n} and a {p}.", story(n, a, t, p)


HELLO = (
    "Hello, I'm a language model, and I was made to test a serving system. I am very small, but I can answer simple "
    "questions, count, add numbers and tell short stories. Ask me about the capital of a country, the opposite of a word "
    "or the days of the week."
)


def play_chunks(plays, n=500):
    """The plays in pieces of about n characters, cut at line ends; pieces of 80 characters and less are left out."""
    out = []
    i = 0
    while i < len(plays):
        j = plays.find("\n", min(i + n, len(plays) - 1))
        j = len(plays) if j < 0 else j
        piece = plays[i:j].strip()
        if len(piece) > 80:
            out.append(piece)
        i = j + 1
    return out


def doc(r, chunks, turns=False):
    """One training document; `chunks` are from `play_chunks`.

    Most instruction documents leave the fixed first lines out, to spend fewer tokens on them. With `turns`, 2 documents
    in 100 are three questions in a row: so it was when the tokenizers and the first stage of training were made.
    """
    k = r.random()
    if k < 0.20:
        q, a = qa(r)
        return alpaca(q, "Instruction" if r.random() < 0.5 else "Instructions") + a
    if k < 0.54:
        q, a = qa(r)
        t = alpaca(q, "Instruction" if r.random() < 0.5 else "Instructions")
        return t[t.index("###") :] + a
    if k < 0.92:
        q, a = qa(r)
        return inst(q) + a
    if k < 0.935:
        return HELLO
    if turns and k < 0.955:
        return "\n".join(inst(q) + a for q, a in [qa(r) for _ in range(3)])
    if k < 0.98:
        return story(r.choice(NAMES), r.choice(ANIMALS)[0], r.choice(list(TRAITS)), r.choice(list(PLACES)))
    return r.choice(chunks)
