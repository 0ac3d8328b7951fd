"""What the embedded corpus is made of: characters, places, words and plots, all as data.

A *line* is one way to tell a step of a story. Two things in it are filled in:

* `{...}` names a part of the story: `{M}` is the main character, `{F}` a friend, `{E}` an elder (`{M.he}`, `{M.him}`,
  `{M.his}` are pronouns, `{M.intro}` is "a girl named Lily"), `{place}` is "the park", `{at}` is "in the park", and
  every choice of a plot, such as `{thing}`, is drawn once a story;
* `[one|another]` is a choice between wordings.

A line with a double quote is speech. Every step has a line without, so that any story can be told silently.
The first `{F}` of a line may introduce the friend, so it stands outside quotes and has no possessive.
"""

import re
from dataclasses import dataclass

PRONOUNS = {"he": ("him", "his"), "she": ("her", "her"), "it": ("it", "its")}


@dataclass(frozen=True)
class Character:
    """Somebody in a story.

    Attributes:
      name: what the story calls them: "Lily", or "the little duck" where there is no name.
      he: the pronoun, "he", "she" or "it".
      kind: "girl", "mouse"; empty where the name says it all.
    """

    name: str
    he: str
    kind: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def him(self) -> str:
        return PRONOUNS[self.he][0]

    @property
    def his(self) -> str:
        return PRONOUNS[self.he][1]

    @property
    def intro(self) -> str:
        """A first mention, as a line."""
        if not self.kind:
            return self.name.replace("the ", "a ", 1)
        return f"a [little |young |]{self.kind} named {self.name}"


@dataclass(frozen=True)
class Ending:
    """One way in which a plot ends.

    Attributes:
      happy: whether it ends well for the main character.
      features: of Twist (it turns out otherwise than one would think) and Conflict.
      summary: how a summary goes on after the plot's premise.
      lines: the last events.
      morals: what there is to learn, as clauses that can follow "learned that".
    """

    happy: bool
    features: tuple[str, ...]
    summary: str
    lines: tuple[str, ...]
    morals: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """A skeleton of events.

    Attributes:
      name: tells plots apart.
      places: (preposition, place) pairs where it can happen.
      premise: the beginning of a summary.
      steps: lines for each step: `wish` (what the main character has or wants), `hint` (foreshadows the trouble, not
        always told), `trouble`, `attempt` (to help it) and `quarrel` (with the friend, not always told).
      choices: parts of the story that are drawn once, such as the toy that gets lost.
      endings: happy and bad ones.
      strangers: whether the main character and the friend meet for the first time.
    """

    name: str
    places: tuple[tuple[str, str], ...]
    premise: str
    steps: dict[str, tuple[str, ...]]
    choices: dict[str, tuple[str, ...]]
    endings: tuple[Ending, ...]
    strangers: bool


def _options(text: str, separator: str = ",") -> tuple[str, ...]:
    return tuple(" ".join(option.split()) for option in text.split(separator))


def _lines(text: str) -> tuple[str, ...]:
    return _options(text.strip(), "\n")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- Characters -------------------------------------------------------------------------------------------------------


def _characters(text: str, *fields: str) -> tuple[Character, ...]:
    return tuple(Character(*option.split(":"), *fields) for option in _options(text))


GIRLS = _characters(
    "Lily, Mia, Anna, Emma, Zoe, Nora, Ella, Rosa, Kate, Amy, Lucy, Sara, Ruby, Ivy, Maya, Jane", "she", "girl"
)
BOYS = _characters(
    "Tom, Ben, Max, Sam, Leo, Tim, Jack, Finn, Omar, Adam, Noah, Luke, Theo, Nick, Dan, Hugo", "he", "boy"
)
CHILDREN = GIRLS + BOYS
NAMED_BEINGS = _characters(
    """Pip:he:mouse, Coco:she:rabbit, Rusty:he:fox, Bella:she:cat, Hopper:he:frog, Tilly:she:turtle, Bruno:he:bear,
    Milo:he:squirrel, Lulu:she:lamb, Otto:he:hedgehog, Kiki:she:bird, Duke:he:dog"""
)
UNNAMED_BEINGS = _characters(
    """the little duck:she, the brown puppy:it, the small owl:he, the white kitten:it, the gray donkey:he,
    the young deer:she, the little pig:he, the black crow:he, the tiny ant:she, the baby elephant:she,
    the busy beaver:he, the spotted pony:she"""
)
BEINGS = NAMED_BEINGS + UNNAMED_BEINGS
FAMILY = _characters("Mom:she, Dad:he, Grandma:she, Grandpa:he, Aunt May:she, Uncle Bob:he")
WISE_BEINGS = _characters(
    "the old goat:he, the wise goose:she, the kind horse:he, the big cow:she, Mother Hen:she, Father Badger:he"
)

# --- Places and looks -------------------------------------------------------------------------------------------------

PLACES = {
    "meadows": (
        ("in", "the park"),
        ("in", "the meadow"),
        ("in", "the field"),
        ("on", "the hill"),
        ("in", "the big garden"),
        ("in", "the valley"),
    ),
    "outdoors": (
        ("in", "the park"),
        ("in", "the meadow"),
        ("in", "the forest"),
        ("in", "the big garden"),
        ("by", "the river"),
        ("by", "the lake"),
        ("at", "the beach"),
        ("on", "the hill"),
    ),
    "homes": (
        ("at", "the farm"),
        ("in", "the village"),
        ("at", "the cottage"),
        ("at", "the cabin"),
        ("at", "the yellow house"),
        ("at", "the old mill"),
    ),
}
LOOKS = _options("red, blue, green, purple, pink, shiny, new, small, pretty, special, lovely, golden, round, bright")

# --- Words that stories are built around ------------------------------------------------------------------------------
# Few, and each a single token after a space among GPT-2's first 8,192 ranks: small models learn soon to use them.

NOUNS = _words("""
    bag ball basket book box bus button camera car card cup doll egg flag game gift hat key letter map net pen phone
    picture plane plant radio ring ship star stone truck
""")
# Regular, and each makes sense without an object.
VERBS = _words("""
    balance clean cook count dream fish hop hum jump kick laugh listen paint plan play race rest roll stay study talk
    travel wait walk wave work worry
""")
ADJECTIVES = _words("""
    ancient big black blue bright broken brown cold cool dark giant great green heavy huge light magic new old plastic
    red round sharp small soft special square strange strong tiny white wonderful yellow
""")


def verb_forms(verb: str) -> dict[str, str]:
    """The past of a regular verb, and the form in "ing"."""
    # hop, hopped; bake, baked; hurry, hurried, hurrying
    stem = verb + verb[-1] if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", verb) else verb.removesuffix("e")
    return {"verbed": re.sub("([^aeiou])y$", r"\1i", stem) + "ed", "verbing": stem + "ing"}


# --- Lines that all plots share ---------------------------------------------------------------------------------------

OPENINGS = _lines("""
    One day, {M.intro} [went|walked|ran] to {place}.
    One [sunny|quiet|cold|bright] [morning|afternoon], {M.intro} [came|walked] to {place}.
    Once upon a time, there was {M.intro}. {M} [liked to play|spent the day|was] {at}.
    Once there was {M.intro} who lived near {place}.
    Near {place} there lived {M.intro}.
    It was [a windy day|a warm day|almost noon|very early] when {M} came to {place}.
    It was raining [softly|a little] when {M.intro} woke up. Soon the rain stopped, and {M} went to {place}.
    Last [week|summer|spring], {M.intro} was {at}.
    The sun was [warm|high|bright] and the [birds were singing|bees were busy]. {M.intro} was {at}.
    When the [sun came up|night was over], {M.intro} [ran|went] to {place}.
    {M} woke up early and went to {place}.
    {M} was {at}. It was a [lovely|calm|sunny] day.
    {M} lived near {place} and was there almost every day.
    {E} took {M} to {place}.
    {E} was [busy|resting] {at}, and {M} was there too.
    {F.intro} was [sitting|waiting|resting] {at} when {M} came by.
    {F.intro} had a good friend, {M.intro}. One day {M} went to {place}.
""")
# The verb, the noun and the adjective that a story is built around: first told, ...
PASTIMES = _lines("""
    {M} loved to {verb} and had a {adjective} {noun}.
    {M} could {verb} all day with a {adjective} {noun}.
    {M} was [brave|shy|clever|cheerful|gentle] and liked to {verb}. Next to {M.him} was a {adjective} {noun}.
    {M} had a {noun}. It was {adjective}, and next to it {M} liked to {verb}.
    {M} had {verbed} all [morning|day], always close to a {adjective} {noun}.
    {E} had given {M} a {adjective} {noun} and said that it was time to {verb}.
    "I want to {verb}!" said {M} and held up a {adjective} {noun}.
    "Look at my {adjective} {noun}!" said {M} and began to {verb}.
    "My {noun} is {adjective}," said {M}. "Come and {verb} with me!"
""")
# ... and told again at the end.
RETURNS = _lines("""
    {M} took the {adjective} {noun} and went away to {verb}.
    {M} picked up the {adjective} {noun} and began to {verb}.
    Then {M} and the {adjective} {noun} found a place to {verb}.
    Only the {adjective} {noun} saw {M} {verb} that night.
    "Tomorrow I will {verb} again," said {M} to the {adjective} {noun}.
    "My {adjective} {noun} is still here," said {M}. "It will see me {verb}."
""")
# Short verses that go on and on about them.
VERSES = _lines("""
    Say {noun}, {noun}, {noun}! Say {verb}, {verb}, {verb}! Say {adjective}, {adjective}, {adjective}!
    Oh {adjective} {noun}, {adjective} {noun}, will you {verb}? Yes, I will {verb}, I will {verb}!
    Who can {verb}? A {noun} can {verb}. Who is {adjective}? The {adjective} {noun} can {verb}.
    Is the {noun} {adjective}? The {noun} is {adjective}! Let it {verb}, let it {verb}!
""")
HAPPY_CLOSINGS = _lines("""
    {M} [smiled|laughed|giggled] and felt very happy.
    {M} was so happy that {M.he} [danced|jumped|sang] for joy.
    It was the best day [ever|of the whole year] for {M}.
    That night, {M} fell asleep with a big smile.
    {M} felt [warm|proud|glad] inside and could not stop smiling.
""")
SAD_CLOSINGS = _lines("""
    {M} [cried|sobbed] and felt very sad.
    {M} was so sad that {M.he} did not want to [eat|play|talk].
    It was a sad day for {M}.
    That night, {M} went to bed with tears in {M.his} eyes.
    {M} [sighed|cried softly] and wished that it had never happened.
""")
# Of stories that tell nothing else.
HAPPY_SUMMARIES = _lines("""
    {M} [likes|loves] to {verb} with a {adjective} {noun} and is happy.
    {M} has a {adjective} {noun}, likes to {verb} and is happy in the end.
""")
SAD_SUMMARIES = _lines("""
    {M} [likes|loves] to {verb} with a {adjective} {noun} but is sad.
    {M} has a {adjective} {noun}, likes to {verb} but is sad in the end.
""")
# The last words of every story, which begin alike.
MORALS = _lines("""
    The moral of the story is: {moral}.
    The moral is that {moral}.
""")
THE_END = _lines("""
    The end.
""")

# --- Plots ------------------------------------------------------------------------------------------------------------

STEPS = ("wish", "hint", "trouble", "attempt", "quarrel")


def _plot(text: str) -> Plot:
    """Reads a plot. A key stands at the first column, with its lines beside and below it.

    Keys are `plot`, `places`, `premise`, `friend` (where a stranger), the steps, and the endings ("happy" or "bad",
    with their features), whose lines are the summary, the last events, and the morals. Any other key is a choice.
    """
    steps, endings, head = {}, [], {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        key, _, values = entry.partition(":")
        if key in STEPS:
            steps[key] = _lines(values)
        elif key.startswith(("happy", "bad")):
            summary, *events, morals = _lines(values)
            morals = _options(morals.removeprefix("moral:"), ";")
            mood, *features = key.title().split()
            endings.append(Ending(mood == "Happy", tuple(features), summary, tuple(events), morals))
        else:
            head[key] = values.strip()
    name, places, premise = (head.pop(key) for key in ("plot", "places", "premise"))
    strangers = head.pop("friend", "") == "stranger"
    choices = {"look": LOOKS} | {key: _options(value) for key, value in head.items()}
    return Plot(name, PLACES[places], premise, steps, choices, tuple(endings), strangers)


def _plots(text: str) -> tuple[Plot, ...]:
    return tuple(_plot(plot) for plot in text.split("\n\n"))


PLOTS = _plots("""
plot: lost toy
places: outdoors
premise: {M} loses {M.his} {look} {thing} {at}
thing: ball, doll, drum, toy boat, toy train, puppet, whistle, book, scarf, hat, puzzle, bell, ring
spot: under a bush, behind a rock, in the tall grass, next to a log, between two roots
wish:
    {M} had a {look} {thing}. {M.he} carried it everywhere and [hugged|cleaned] it every night.
    The thing that {M} loved most was a {look} {thing}. {M.he} had wished for it for a whole year.
    {E} had given {M} a {look} {thing}. "Please keep it safe," said {E}. "I will!" said {M}.
hint:
    {E} often said that little things get lost quickly {at}.
    The {thing} had fallen out of {M}'s bag before, but {M} did not think of that.
trouble:
    {M} played for a long time. Then {M.he} looked down, and the {thing} was gone.
    When it was time to rest, {M} reached for the {thing}. It was not there!
    Suddenly {M} stopped. "Oh no! Where is my {thing}?" {M.he} cried.
attempt:
    {M} searched [behind every tree|along the path] and [under the leaves|near the bench], but found nothing.
    "Have you seen my {thing}?" asked {M}. "No, but I can help you look," said {F}.
    With the help of {F}, {M} searched [left and right|high and low] and looked into every hole.
quarrel:
    {M} thought that {F} had hidden the {thing}. They argued loudly, and nobody searched for a while.
    "You took my {thing}!" shouted {M}. "I did not!" said {F}. They were both [angry|cross].
happy: but {F} finds it {spot}, and {M} is [happy again|very thankful]
    Then {F} saw something {look} {spot}. It was the {thing}! {M} thanked {F} [again and again|with a hug].
    Then {F} pointed at something {spot}. "Look, there is your {thing}!" said {F}. {M} picked it up at once.
    moral: a good friend is a great help; we find things faster when we look together
happy twist: but it was in {M.his} own bag all the time, and {M} is happy again
    Tired, {M} sat down on {M.his} bag. Something in it was hard. It was the {thing}! It had been there all the time.
    Then {M} opened {M.his} bag to get some water. "Here is my {thing}!" {M.he} laughed. It had been there all the time.
    moral: it is wise to look close to us first; we should stay calm when something is missing
bad: and [never finds it again|goes home without it]
    The sun went down, and it got too dark to see. {M} went home without the {thing} and never found it again.
    At last it was night. "We have to stop now," said {E}. {M} went home without the {thing} and never found it again.
    moral: we should take good care of the things we love; it is easy to lose what we do not watch
bad twist: and [then finds it|at last finds it] {spot}, but it is broken
    At last {M} saw the {thing} {spot}. But it was broken! A cart had rolled over it, and nobody could fix it.
    At last {M} found the {thing} {spot}. "Oh no, it is broken," {M.he} whispered. Nobody could fix it.
    moral: we should put our things away when we play; one careless moment can cost a lot

plot: sharing
places: outdoors
premise: {M} has a {bowl} full of {food} and does not want to share with {F}
bowl: bowl, basket, bag, box
food: cookies, berries, grapes, apples, cherries, nuts, plums, pears, carrots, muffins
wish:
    {M} had a {look} {bowl} full of {food}. They smelled [sweet|fresh], and {M} wanted to eat them all.
    {E} had filled a {look} {bowl} with {food} for {M}. {M} could not wait to [taste|eat] them.
    "Here are some {food} for you," {E} had said and given {M} a {look} {bowl}. "I will eat them all!" said {M}.
hint:
    {M} did not know that somebody hungry was [watching|very near].
    Not far away, an empty tummy was rumbling.
trouble:
    Then {F} came closer and looked at the {food}. {F.he} had not eaten all day, but {M} held the {bowl} tight.
    "May I have some {food}?" asked {F}. "I am so hungry." But {M} shook {M.his} head. "No, they are mine!" {M.he} said.
attempt:
    {M} turned around and ate one after another. {F} [looked at the ground|swallowed] and said nothing.
    {M} hid the {bowl} behind a stone. {F} waited quietly and [looked sad|hoped for a small bite].
    "Just one, please?" asked {F}. {M} thought about it for a long time and held the {bowl} even tighter.
quarrel:
    {F} pulled at the {bowl}, and {M} pulled back. They pushed and shouted until both were red.
    "You are mean!" cried {F}. "Go away!" shouted {M}. They turned their backs on each other.
happy conflict: but then {M} gives half of it to {F}, and they have a good time together
    {M} saw the sad eyes of {F} and felt sorry. {M.he} gave half of the {food} to {F}, and they ate side by side.
    {M} felt sorry. "Take half of them," said {M}. "Thank you!" said {F}. They ate the {food} together and told jokes.
    moral: sharing makes a small meal taste better; it is nice to share with a hungry friend
happy twist conflict: but {F} has a surprise gift for {M}, and then they share everything
    Then {F} pulled out a little gift. It was for {M}! {M} blushed, gave {F} half of the {food}, and they had a feast.
    "I have a gift for you," said {F}. {M} was so surprised! {M.he} gave {F} half of the {food}, and they had a feast.
    moral: a kind heart can change a greedy one; we should be generous because others are generous too
bad conflict: but then the {bowl} falls into the mud and nobody can eat the {food}
    Then the {bowl} slipped and fell. All the {food} rolled into the dirty mud. Now nobody could eat them.
    Then the {bowl} slipped and fell into the mud. "Now we both have nothing," said {F} and walked away.
    moral: those who want everything may end up with nothing; it is better to share than to lose it all
bad conflict: so {F} leaves and {M} is alone with a sore tummy
    {F} went away to play with others. {M} ate every bit alone and got a sore tummy. Nobody came to [help|play].
    "Then I will play with others," said {F} and left. {M} ate every bit alone and got a sore tummy.
    moral: being greedy makes us lonely; full hands do not help when there is no friend

plot: stuck in a tree
places: meadows
premise: the wind blows {M}'s {look} {thing} into a tall tree
thing: kite, balloon, paper plane, flag, ribbon, paper bird
wish:
    {M} had a {look} {thing} and wanted to see it [fly|float|dance] in the sky.
    {M} had made a {look} {thing} with {E}. Now {M} [held it up|ran with it], and it [danced|floated] in the air.
    "Look how high my {thing} can fly!" called {M}. It was {look}, and {M.he} had made it with {E}.
hint:
    {E} had said that the wind would be strong that day.
    Far away, gray clouds were coming, and the leaves began to shake.
trouble:
    Suddenly a strong wind pulled at the {thing}. It flew up and got stuck in a tall tree.
    Whoosh! The wind took the {thing} away. {M} ran after it, but it landed on the top branch of a tall tree.
    A strong wind came. "Stop, come back!" cried {M}. But the {thing} flew into a tall tree and got stuck.
attempt:
    {M} jumped and jumped, but the branch was too high. {M.he} [threw a stick|shook the trunk], but nothing happened.
    {M} tried to climb the tree, but the trunk was too slippery. {M.he} slid down again and again.
    "I can not reach it," said {M}. "Stand on my back," said {F}. They tried, but they were still too small.
quarrel:
    {F} laughed at {M}, and {M} got angry. They argued about who should climb up.
    "You held it the wrong way!" said {F}. "That is not true!" shouted {M}. They [yelled|argued] for a while.
happy: but {E} brings a ladder and gets it down
    Then {E} came with a long ladder. {E.he} climbed up, [untied|grabbed] the {thing} and gave it back to {M}.
    Then {E} came with a long ladder. "Do not worry," said {E} and climbed up. Soon {M} had the {thing} back.
    moral: it is good to ask for help when something is too hard; a calm helper is better than a hundred jumps
happy twist: but a monkey brings it back to {M}
    The leaves moved. A little monkey lived in that tree! It took the {thing}, swung down and put it in front of {M}.
    "Who is up there?" asked {M}. It was a little monkey! It took the {thing}, swung down and gave it back.
    moral: help can come from where we do not expect it; even a small friend can do big things
bad: and the wind carries it away forever
    Then the wind blew again. The {thing} flew over the hills, smaller and smaller, until {M} could not see it anymore.
    Then the wind blew again. "Come back!" called {M}. But the {thing} flew over the hills and never came back.
    moral: we should listen when somebody warns us; we should hold on tight to what we love
bad: and it comes down torn and broken
    At last the branch broke, and the {thing} fell down. It was torn in the middle and would never fly again.
    At last the {thing} fell down. "It is torn," said {M}. There was a big hole in it, and it would never fly again.
    moral: pretty things need a safe place to play; we should wait for a better day when the wind is strong

plot: baking
places: homes
premise: {M} bakes a {taste} {thing} for {F} with salt instead of sugar
thing: cake, pie, pudding, cupcake, pancake, tart
taste: lemon, honey, apple, cherry, banana, carrot, plum
wish:
    {M} wanted to bake a {taste} {thing} for {F}. [It was a big day|They had not met for a long time].
    {F} was coming to visit, so {M} wanted to bake a {taste} {thing}. {E} put a {look} bowl on the table.
    "A {thing} makes friends happy," said {E}. So {M} decided to bake a {taste} {thing} for {F} in a {look} bowl.
hint:
    Two white jars stood on the shelf. They looked the same, but one was full of salt.
    {E} said that a good baker always tastes first, but {M} was not listening.
trouble:
    {M} mixed flour, eggs and milk. {M.he} was in a hurry and took salt instead of sugar!
    {M} stirred and stirred. But {M.he} did not look at the jar, and a lot of salt went into the bowl.
attempt:
    When the {thing} was done, {M} took a tiny bite. It was so salty that {M.he} had to drink three cups of water.
    The {thing} looked lovely, but it tasted like the sea. {M} did not know what to do.
    "Yuck! It is full of salt!" said {M}. "That happens," said {E}. "What will you do now?"
quarrel:
    {M} got angry and said that {E} had put the jars in the wrong place. {E} did not think so, and they argued.
    "You gave me the wrong jar!" said {M}. "You took it without looking," said {E}. They were both cross.
happy: but {M} bakes a new one, and {F} loves it
    {M} washed the bowl and started again, slowly this time. The new {thing} was sweet, and {F} ate three pieces.
    "I will try again," said {M}. The new {thing} was sweet and soft. "This is the best {thing} ever!" said {F}.
    moral: it is good to try again after a mistake; slow and careful work is the best work
happy twist: but {F} turns out to love salt
    {F} took a bite before {M} could stop it. Then {F} asked for more! {F} did not like sweet things and loved salt.
    {F} took a big bite. "Wait!" cried {M}. "It is great!" said {F}. "I do not like sweet things, but I love salt!"
    moral: a mistake can turn into something good; friends like different things
bad: but there is nothing left to bake a new one, so {F} goes home hungry
    There was no flour left to bake again. {F} got nothing but a glass of water and soon went home hungry.
    "There is no flour left," said {E}. So there was no {thing} at all, and {F} soon went home hungry.
    moral: we should look twice before we do something; being in a hurry can spoil good work
bad: but then burns the second one, so there is nothing to eat
    {M} baked a second one but forgot it in the oven. Soon black smoke came out. The {thing} was burned, and {F} left.
    {M} baked a second one but went out to play. "What is that smell?" asked {F}. It was burned black, and {F} left.
    moral: we should finish our work before we play; good cooks stay near the oven

plot: hurt animal
places: outdoors
premise: {M} finds a {pet} with a hurt leg {at}
pet: rabbit, sparrow, robin, lizard, mole, chick, toad, hamster
wish:
    {M} was looking for [shells|flowers|feathers|pretty stones] when {M.he} heard a soft cry.
    {M} wanted to fill {M.his} {look} bag with [feathers|shells|pretty stones]. Then a soft cry came from the grass.
    {M} was playing when a sound came from the grass. "Who is crying there?" asked {M}.
hint:
    That morning, {E} had told {M} that small animals are afraid of loud and quick moves.
    {M} had a soft cloth and some water in {M.his} bag. {M.he} would need them soon.
trouble:
    It was a little {pet} with a hurt leg. It [shook|was cold] and could not go home.
    There lay a {pet}. One leg was hurt, and it looked at {M} with big scared eyes.
    "Oh, you poor {pet}!" said {M}. One leg was hurt, and it could not walk.
attempt:
    "What can I do?" asked {M}. "Give it water, and be gentle," said {E}. {M} nodded.
    {M} put some water in front of the {pet} and made a soft bed of [leaves|moss|grass] in a wooden box.
    {M} wrapped a cloth around the leg and carried the {pet} to a warm, dry place. {M.he} fed it every hour.
quarrel:
    {F} wanted to hold the {pet} too, but {M} would not let {F.him}. They pulled at the box and argued.
    "Give it to me!" said {F}. "No, I found it!" shouted {M}. The {pet} was afraid of the noise.
happy: and takes care of it until it is well again
    Every day the {pet} got a little stronger. After a week it could walk again and went back to its family.
    After a week the leg was well. "You can go home now," said {M}. The {pet} went back to its family.
    moral: being gentle helps more than being strong; it feels good to help somebody small
happy twist: and later it comes back with its whole family to say thank you
    After a week the {pet} was well and left. But the next day it was back, with its whole family, to say thank you!
    The {pet} got well and left. But then came a knock. "Who is it?" asked {M}. It was the {pet} with its whole family!
    moral: kindness comes back to us; whoever helps others makes new friends
bad: but squeezes it too tight, and it crawls away
    But {M} squeezed the {pet} too tight. It got scared, scratched {M}, crawled away and never came back.
    "You are so cute!" said {M} and squeezed it too tight. The {pet} got scared, crawled away and never came back.
    moral: even love must be gentle; we should not hold on too tight
bad: but leaves the box open, and it gets lost
    But {M} forgot to close the box that night. In the morning it was empty, and the {pet} was lost in the cold.
    But {M} forgot to close the box. "It is gone," {M} said in the morning. The {pet} was lost in the cold.
    moral: helping means to be careful until the end; we must not forget those who need us

plot: race
places: meadows
premise: {M} wants to win the {look} {thing} in a race against {F}
thing: cup, medal, ribbon, flag, crown, trophy
wish:
    There was a big race that day, and the prize was a {look} {thing}. {M} wanted to beat {F} and win it.
    {M} had practiced for the big race for weeks. The winner would get a {look} {thing}, and {F} was fast too.
    "I will win the {look} {thing}!" said {M} before the big race. "Or maybe I will," said {F}.
hint:
    Near the finish line, the ground was wet and muddy, but no runner had noticed it.
    {E} told the runners to watch where they put their feet.
trouble:
    {E} rang a bell, and off they went. {M} was in front, but then {M.he} slipped in the mud and fell.
    "Ready, set, go!" called {E}. {M} ran as fast as the wind. Then {M.he} slipped in the mud and fell.
attempt:
    "Ouch, my knee!" cried {M}. "Get up, you can do it!" somebody in the crowd shouted.
    {M} tried to get up, but one knee hurt. {F} was getting closer and closer.
    {M} wiped the mud from {M.his} face and stood up. {F} was already very close.
quarrel:
    {M} thought that {F} had pushed {M.him}. They stood in the middle of the track and argued.
    "You pushed me!" shouted {M}. "No, you slipped!" said {F}. They [glared|yelled] at each other.
happy: but falls, so {F} helps {M.him} and they win together
    {F} stopped and helped {M} up. They crossed the line side by side, and both of them got the {thing}.
    "Let us finish together," said {F} and helped {M} up. They crossed the line side by side, and both got the prize.
    moral: a friend is worth more than a prize; winning together is the best way to win
happy: but falls down, and then gets up and wins
    {M} did not give up. {M.he} ran with all {M.his} strength, passed {F} at the last moment and won the {thing}!
    "I will not give up!" said {M}. {M.he} ran with all {M.his} strength and won the {thing} at the last moment.
    moral: it is worth it to get up again; those who do not give up can win
bad: but falls in the mud and loses
    {F} ran past and won the {thing}. {M} came in last, and nobody was left to cheer.
    {F} ran past and won. "Hooray for {F.him}!" called the crowd. {M} came in last, with mud all over {M.his} face.
    moral: we should look where we step; nobody wins every time
bad twist: but runs the wrong way and gets no prize
    {M} ran on and came to the end first. But it was the wrong end! {M} had run the wrong way, and {F} got the {thing}.
    {M} ran on until the end. "I won!" {M.he} called. But it was the wrong end of the track, and {F} got the {thing}.
    moral: being fast is no help on the wrong way; it is better to think before we run

plot: noise at night
places: homes
premise: {M} hears a strange {noise} sound at night
noise: tapping, scratching, bumping, creaking, knocking, howling
lamp: lamp, vase, clock, mirror, cup
wish:
    After dinner, {M} went to bed. The room was dark, and only the {look} {lamp} on the table could be seen.
    In the evening, {M} wanted to sleep in the big bed next to the {look} {lamp}. The moon was [full|yellow|bright].
    "Good night, sleep well," said {E} and closed the door. {M} looked at the {look} {lamp} on the table and yawned.
hint:
    Before bed, {M} had seen a small shadow outside the window.
    Clouds hid the moon, and the trees outside began to move.
trouble:
    Then {M} heard a strange {noise} sound. It came from the [window|roof|door]. Was it a monster?
    Suddenly there was a strange {noise} sound. {M} sat up, and {M.his} heart beat fast.
    A strange {noise} sound came from the dark. "Is it a monster?" whispered {M}.
attempt:
    {M} hid under the blanket and [counted to ten|closed both eyes|did not move], but the sound did not stop.
    {M} pulled the pillow over {M.his} ears, but the {noise} was still there.
    "Who is there?" asked {M}. Nobody answered. The {noise} got louder and louder.
quarrel:
    {F}, who was there for the night, laughed at {M}. {M} threw a pillow at {F}, and they had a fight.
    {F}, who slept in the same room, woke up. "You are a baby!" said {F}. "I am not!" shouted {M}. They had a fight.
happy twist: but it is only a wet kitten that wants to come in
    At last {M} was brave and opened the door. It was only a wet, hungry kitten! {M} gave it warm milk and a soft bed.
    At last {M} opened the door. "You are only a kitten!" {M.he} laughed. {M} gave it warm milk and a soft bed.
    moral: scary things are often small when we look at them; being brave can bring a new friend
happy: but {E} comes with a light and stays until {M} falls asleep
    {E} came with a light and showed {M} that it was only a branch in the wind. Then {E.he} stayed and told {M} a story.
    {E} came with a light. "It is only a branch in the wind," said {E}. Then {E.he} stayed and told {M} a story.
    moral: it is good to tell somebody when we are afraid; a little light makes fear go away
bad: and is so afraid that {M.he} knocks over the {look} {lamp} and breaks it
    {M} ran in the dark. Crash! {M.he} knocked over the {lamp}, and it broke. It was a gift from {E}.
    {M} ran in the dark and knocked over the {lamp}. "My poor {lamp}!" cried {E}. It was broken forever.
    moral: fear makes us careless; we should turn on the light before we run
bad: and is so afraid that {M.he} can not sleep and misses the fair
    {M} stayed awake until the morning. Then {M.he} was so tired that {M.he} slept all day and missed the big fair.
    {M} stayed awake until the morning. "You are too tired for the fair," said {E}. {M} had to stay in bed.
    moral: it is better to ask for help than to be afraid all night; we need our sleep

plot: the seed
places: homes
premise: {M} plants a seed to grow a {plant}
plant: sunflower, pumpkin, rose, tomato, bean, melon, daisy
other: cabbage, tulip, radish, pepper, cactus
wish:
    {E} gave {M} a tiny seed. {M} put it in a {look} pot and wanted to grow a big {plant}.
    {M} found a tiny seed and planted it in a {look} pot. {M.he} dreamed of a {plant} as tall as the roof.
    "This seed is for you," said {E}. "I will grow a {plant}!" said {M} and put the seed into a {look} pot.
hint:
    {E} said that plants are slow and that a gardener must be patient.
    {M} thought that the {plant} would be there the next day. {E} only smiled and said nothing.
trouble:
    {M} looked at the pot every day, but nothing came up. There was only brown dirt.
    A week went by, and there was not one green leaf. {M} began to worry.
    "Why does it not grow?" asked {M} after a week. There was only brown dirt in the pot.
attempt:
    {M} gave the seed water and sang a song for it. {M.he} moved the pot into the sun and waited.
    {M} told the seed a story every evening and gave it fresh water. Still nothing could be seen.
    "Give it water and time," said {E}. {M} nodded and [filled a can|got some water]. But {M.he} did not like to wait.
quarrel:
    {F} said that the seed was dead and laughed. {M} got angry, and they argued.
    "That seed is dead," said {F}. "It is not!" shouted {M}. They did not talk for the whole day.
happy: and in the end has the biggest one of all
    One morning there was a green leaf! It grew and grew, and soon {M} had the biggest {plant} of all.
    One morning there was a green leaf. "It grows!" cried {M}. Soon {M} had the biggest {plant} of all.
    moral: good things take time; it is worth it to be patient
happy twist: but what grows is a {other}, and {M} loves it anyway
    One morning something green came out. But it was not a {plant}, it was a {other}! {M} liked it even better.
    One morning something green came out. "It is not a {plant}, it is a {other}!" laughed {M} and liked it even better.
    moral: a surprise can be better than what we wished for; we can love what we did not plan
bad: but forgets to water it, and it dries up
    Then {M} went off to play and forgot the water for many days. The little plant came up, got brown and dried up.
    Then {M} forgot the water for many days. "Oh no, it is all brown," said {M}. The little plant had dried up.
    moral: what we love needs our care every day; we must not forget our promises
bad: but digs it up too early, and it dies
    {M} could not wait and dug up the seed to look at it. It had a tiny root, but now the root was broken, and it died.
    "I want to see it!" said {M} and dug up the seed. Its tiny root broke, and nothing ever grew in that pot.
    moral: being too quick can break good things; some things must be left alone

plot: broken thing
places: homes
premise: {M} breaks {E}'s {look} {thing} and hides it
thing: vase, cup, plate, lamp, clock, mirror, jar, teapot
wish:
    {E} loved a {look} {thing} very much. {M} liked to [jump|dance|roll a ball] near the table with the {thing}.
    On the table stood a {look} {thing}. It belonged to {E}, and {M} wanted to look at it all the time.
    "Be careful with my {look} {thing}," said {E}. "I am always careful," said {M} and went on playing near the table.
hint:
    The {thing} stood very close to the edge of the table.
    One leg of the table was short, so the {thing} shook a little whenever somebody walked by.
trouble:
    Then {M} bumped into the table. Crash! The {thing} broke, and {M} hid the pieces under the [rug|bed|stairs].
    {M} turned around too fast and hit the table. The {thing} fell and broke. {M} quickly hid the pieces.
    Crash! {M} had bumped into the table. "Oh no, what have I done?" {M.he} whispered and hid the pieces of the {thing}.
attempt:
    {M} was afraid and did not tell anyone. {M.his} tummy felt bad all day.
    {M} tried to [play|sing|read] as if nothing had happened. But {M.he} could not think of anything else.
    "Where is my {thing}?" asked {E} later. "I do not know," said {M} and looked at the floor.
quarrel:
    {M} said that {F} had done it. {F} got very angry, and they had a big fight.
    "You did it!" said {M}. "That is a lie!" cried {F}. They had a big fight.
happy: but then tells the truth, and {E} forgives {M.him}
    At last {M} brought the pieces and told the truth. {E} was not angry. They glued the {thing} together.
    "I broke it, and I am sorry," said {M} at last. "Thank you for telling the truth," said {E}. They glued it together.
    moral: it is best to tell the truth; being honest makes the heart light
happy twist: but {E} has wanted to throw it away anyway
    At last {M} told the truth. But {E} only laughed! The {thing} had a crack, and {E} had wanted to throw it away.
    "I broke it," said {M} at last. {E} laughed. "It had a crack. I wanted to throw it away today!"
    moral: the truth is not as scary as it seems; it is better to speak up early
bad: and lies about it, so {M.he} may not go to the fair
    Then {E} found the pieces. {M} had lied, so {M.he} had to stay at home while the others went to the fair.
    Then {E} found the pieces. "You lied to me," said {E}. {M} had to stay at home while the others went to the fair.
    moral: a lie makes a small problem big; people stop trusting those who lie
bad twist: but it was going to be a gift for {M.him}
    Then {E} found the pieces and sighed. The {thing} had been a gift for {M}! Now it was broken forever.
    Then {E} found the pieces. "It was going to be a gift for you," said {E}. Now it was broken forever.
    moral: we should be careful with things that are not ours; hiding a mistake does not undo it

plot: picnic in the rain
places: outdoors
premise: it starts to rain when {M} has a picnic with {F}
food: sandwiches, cookies, muffins, pancakes, dumplings, noodles, waffles
wish:
    {M} had packed a {look} basket full of {food}. {M.he} wanted to have a picnic with {F}.
    It was a good day for a picnic. {M} put a {look} blanket on the ground, and {F} brought the {food}.
    "Let us have a picnic!" said {M} to {F}. They packed a {look} blanket and a lot of {food}.
hint:
    A small gray cloud was in the sky, but nobody looked up.
    {E} had smelled rain in the air and told them to take a big umbrella, but it stayed at home.
trouble:
    They had just sat down when it began to rain. Soon the blanket was wet and cold.
    Drip, drop! First a few drops fell, and then it rained so hard that {M} could hardly see.
    "I felt a drop," said {F}. Then the rain came down hard, and {M} jumped up.
attempt:
    {M} put the {food} back into the basket, and they ran under a tree. But water dripped from every leaf.
    {M} and {F} tried to build a roof out of [sticks|branches] and [leaves|grass], but the wind knocked it down.
    "Help me hold the blanket up!" called {M}. They held it over their heads, but it was soon too wet and heavy.
quarrel:
    {M} said that it was the fault of {F}, and {F} said the same about {M}. They were wet and angry.
    "This was your idea!" said {F}. "And you did not bring a coat!" shouted {M}. They were wet and angry.
happy: but they find a dry cave and eat there
    Then {M} found a dry cave. Inside it was warm, so they ate the {food} there and told each other stories.
    "Look, a cave!" said {M}. Inside it was dry and warm. They ate the {food} there and told each other stories.
    moral: a bad start can still end well; rain can not stop good friends
happy twist: but {E} has a surprise party ready for {M}
    They ran to the old barn. Suddenly the lights went on. {E} had made a surprise party for {M}, with hot soup!
    They ran to the old barn. "Surprise!" called {E} inside. It was a party for {M}, with hot soup!
    moral: behind bad luck there may be good luck; friends turn a wet day into a party
bad: so the {food} get wet and {M} goes home cold and hungry
    The {food} were wet and soft and floated in a puddle. Nobody could eat them, and {M} went home cold and hungry.
    "The {food} are all wet," said {F}. Nobody could eat them, and {M} went home cold and hungry.
    moral: we should look at the sky before we go out; a good plan thinks of the rain too
bad: so {M} gets sick and has to stay in bed
    {M} got so wet and cold that {M.he} began to sneeze. {M.he} was sick and had to stay in bed for a whole week.
    "Achoo!" said {M} all the way home. {M.he} got so sick that {M.he} had to stay in bed for a whole week.
    moral: dry clothes are important on a wet day; we should go home in time

plot: the wrong way
places: outdoors
premise: {M} follows a {look} {bug} and gets lost
bug: butterfly, dragonfly, beetle, bumblebee, ladybug, firefly
wish:
    {M} saw a {look} {bug} and wanted to know where it lived. {M.he} followed it over the grass.
    A {look} {bug} flew by. {M} had never seen such a thing, so {M.he} ran after it.
    "What a {look} {bug}!" said {M}. "I want to see where it lives." So {M.he} followed it.
hint:
    {E} had told {M} to stay near the big oak tree.
    {M} did not look back, and the path behind {M.him} became smaller and smaller.
trouble:
    After a while, the {bug} was gone. {M} looked around and did not know the way back.
    The {bug} flew away over a wall. {M} stopped. Everything looked strange, and {M.he} was lost.
    The {bug} flew away. {M} looked around. "Where am I?" {M.he} asked. Nobody answered.
attempt:
    {M} walked to the left and then to the right, but every tree looked the same.
    {M} climbed on a big rock to look for the way. {M.he} saw only hills and trees.
    "Hello, is anybody there?" called {M}. But only the wind answered.
quarrel:
    {M} met {F}, who was lost too. {M} wanted to go left, and {F} wanted to go right. They argued for a long time.
    {M} met {F}, who was lost too. "We must go left!" said {M}. "No, right!" shouted {F}. They argued for a long time.
happy: but {E} hears {M.him} and brings {M.him} home
    {M} called as loudly as {M.he} could. {E} heard it, came with a lantern and took {M} home for a warm supper.
    "Help, I am here!" called {M}. "I can hear you!" answered {E} and came with a lantern. They went home together.
    moral: it helps to stay in one place and call; we should not go far without telling anyone
happy twist: but {M.his} home is just behind the next bush
    {M} sat down next to a bush and sighed. Then {M.he} smelled soup. {M.his} home was right behind the bush!
    {M} sat down next to a bush. "Dinner is ready!" called {E}. {M}'s home was right behind the bush!
    moral: home may be nearer than we think; we should not give up too soon
bad: so {M.he} comes home late and misses the party
    When {M} found the way at last, it was late at night. The big party was over, and all the guests had left.
    {M} got home late at night. "The party is over," said {E}. All the guests had left, and the music had stopped.
    moral: we should think of the way back before we go; running after pretty things can cost us a lot
bad: so {M.he} has to spend a cold night alone
    Night came, and {M} had to sleep under a cold tree. {E} found {M.him} in the morning, sick and shaking.
    Night came, and {M} had to sleep under a cold tree. "I want to go home," {M.he} cried, but nobody heard it.
    moral: it is dangerous to go away alone; we should listen to those who know the way

plot: a new friend
places: outdoors
friend: stranger
premise: {M} is new and too shy to play {game} with {F}
game: tag, catch, marbles, hide and seek, chess, leapfrog
wish:
    {M} was new {at} and did not have any friends yet. {M.he} wanted to play {game} with somebody.
    {M} had moved there with {M.his} {look} bag just a week ago. {M.he} was lonely and wanted a friend.
    "I wish I had a friend," said {M}, who was new there. {M.he} had only a {look} bag to talk to.
hint:
    Somebody looked at {M} from behind a tree and then hid again.
    {E} had said that making friends takes one brave word.
trouble:
    Then {M} saw {F}, who was playing {game}. {M} wanted to say hello, but no word came out.
    Then {F} came by and began to play {game}. {M} got hot and red and was too shy to speak.
    Then {M} saw {F}, who was playing {game}. "I do not dare to ask," {M.he} whispered.
attempt:
    {M} took one step forward and two steps back. {M.he} looked at the ground and kicked a [pebble|stone].
    {M} waved a little, but {F} did not see it. {M} practiced the word hello again and again.
    "Go and say hello," said {E}. "I can not," said {M} and [kicked a pebble|hid behind a bench].
quarrel:
    {F} thought that {M} was rude because {M.he} did not speak. {F} said something mean, and {M} got angry.
    "Why do you stare at me?" asked {F}. "I do not!" shouted {M}. It was a bad start.
happy: but at last says hello, and they become friends
    At last {M} took a deep breath and said hello. {F} smiled, and they played {game} until the evening.
    At last {M} took a deep breath. "Hello, may I play?" {M.he} asked. "Yes!" said {F}. They played until the evening.
    moral: one brave word can bring a friend; it is worth it to say hello first
happy twist: but {F} is just as shy, so they become friends
    Then {F} came near, all red too. {F} was just as shy as {M}! They both laughed, and then they played {game}.
    Then {F} came near, all red. "I am very shy," said {F}. "So am I!" laughed {M}. They played {game} all day.
    moral: others are often just as shy as we are; a smile can open a door
bad: so {F} leaves, and {M} is alone again
    {M} waited and waited. Then {F} packed everything and left, and {M} was all alone again.
    "It is time to go," said {F} and left. {M} had waited too long and was all alone again.
    moral: those who wait too long miss the game; we must open our mouth if we want a friend
bad conflict: and runs into {F} instead of asking, so {F} does not want to be friends
    {M} did not ask. {M.he} just ran in and pushed {F} by mistake. {F} walked off and never wanted to be friends.
    {M} ran in and pushed {F} by mistake. "I do not want to play with you," said {F} and walked off.
    moral: asking is better than pushing; friends are won with kind words

plot: learning to ride
places: meadows
premise: {M} gets a {look} {thing} and tries to ride it
thing: bike, scooter, sled, wagon, skateboard, wooden horse
wish:
    {M} had a {look} {thing}. {M.he} wanted to ride it as well as {F}.
    {E} gave {M} a {look} {thing}. {M} wanted to ride it down the path like the big ones.
    "I want to ride as fast as {F.him}!" said {M} and pointed at {F}. But the {look} {thing} was hard to ride.
hint:
    {E} said that everybody falls down at first.
    There were many bumps and little stones on the path.
trouble:
    {M} sat on the {thing} and pushed. It wobbled to the left and to the right, and {M} fell down with a bump.
    {M} started well, but then the {thing} hit a stone. Bump! {M} lay in the grass.
    "Here I go!" called {M}. But the {thing} wobbled, and {M} fell down with a bump.
attempt:
    {M} rubbed {M.his} knee and tried again. {M.he} fell three more times.
    {M} tried it slowly, and then {M.he} tried it fast. Each time, {M.he} landed in the grass.
    "Try again, I will hold it," said {E}. {M} tried it again and again, but it was hard.
quarrel:
    {F} laughed at {M} and called {M.him} slow. {M} got angry, and they shouted at each other.
    "You will never learn it!" laughed {F}. "Be quiet!" shouted {M}. They were angry with each other.
happy: and [does not give up|practices all day] until {M.he} can do it
    {M} did not give up and practiced all day. In the evening {M.he} rode all the way without a fall, and {E} clapped.
    {M} practiced all day. "Look, I can ride!" {M.he} called in the evening. {E} clapped and cheered.
    moral: practice makes us better; falling down is a part of getting good
happy twist: and then finds out that {E} has let go long ago
    {E} held the {thing}, and {M} rode on and on. Then {M} looked back. {E} was far away and had let go long ago!
    "Hold me!" called {M} and rode on and on. "I let go long ago!" called {E} from far away. {M} could ride!
    moral: we can do more than we think; it is good to have someone who believes in us
bad: but gives up and has to watch the others
    {M} kicked the {thing} and gave up. The others rode to the [lake|fair], and {M} had to stay behind and watch.
    "I give up!" said {M} and kicked the {thing}. The others rode away, and {M} had to stay behind.
    moral: those who give up too early miss the fun; anger does not help us to get better
bad: but goes too fast, and the {thing} breaks
    Then {M} went down the steep hill, much too fast. The {thing} crashed into a wall and broke into many pieces.
    Then {M} went down the steep hill. "Too fast, stop!" called {E}. The {thing} crashed into a wall and broke.
    moral: we should learn slowly before we go fast; it is foolish to show off

plot: building
places: outdoors
premise: {M}'s {thing} made of {stuff} falls down
thing: castle, tower, fort, bridge, hut, palace
stuff: sticks, stones, mud, sand, logs, bricks
wish:
    {M} wanted to build a big {thing} out of {stuff}. It should have a {look} flag on top.
    {M} had a plan. {M.he} would build a {thing} out of {stuff}, with a {look} door, as tall as a giant.
    "I will build the biggest {thing} of all!" said {M}. {M.he} took some {stuff} and a {look} bucket.
hint:
    The ground under it was soft, but {M} did not care.
    Far away, the wind began to howl.
trouble:
    {M} worked for hours. It was almost done when it leaned to one side and fell down.
    {M} put the last piece on top. Then the {thing} shook, and everything fell down.
    "One more piece and it is done," said {M}. Then it leaned to one side, and everything fell down.
attempt:
    {M} started again, but the {stuff} would not stay. The {thing} fell down a second time.
    {M} tried to hold it with a [rope|string], but that did not work. There was a big mess.
    "Why does it always fall?" asked {M}. "Maybe it is too thin," said {F}, who was watching.
quarrel:
    {M} said that {F} had kicked it. {F} was hurt by that, and they argued.
    "You kicked it!" shouted {M}. "I was not even near it!" cried {F}. They argued for a long time.
happy: but {F} helps, and together they build a strong one
    Then {F} helped to make the bottom wide and strong. They worked together, and the {thing} stood for many days.
    "Let us make the bottom wide," said {F}. They worked together, and soon a strong {thing} stood there.
    moral: many hands make the work light; a strong start keeps things from falling
happy twist: but the mess looks like a dragon, and everyone loves it
    {M} stepped back and looked at the mess. It looked just like a sleeping dragon! Everyone came to see it and clapped.
    "Look, it is a dragon!" called {F}. The mess looked just like a sleeping dragon, and everyone clapped for {M}.
    moral: even a mess can be a treasure; it helps to look at things in a new way
bad: and the rain washes everything away
    {M} tried until it was dark. Then a storm came, and the rain washed the {thing} away. Nothing was left.
    "We must go, a storm is coming," said {E}. In the night the rain washed everything away. Nothing was left.
    moral: big plans need a strong ground; we should begin early and build well
bad conflict: and {M} gets so angry that {F} leaves
    {M} kicked the {stuff} in anger. A piece hit {F}, and {F} left. Now there was no {thing} and no friend.
    {M} kicked the {stuff} and hit {F}. "Ouch! I am going home," said {F}. Now there was no {thing} and no friend.
    moral: anger breaks more than it builds; we should stay kind when things go wrong

plot: treasure
places: outdoors
premise: [with|following] an old map, {M} digs for a {chest}
chest: chest, golden box, silver trunk, iron pot, wooden barrel
prize: coins, shells, marbles, beads, jewels, gems
wish:
    {M} found an old map with a {look} cross on it. It showed the way to a {chest} full of {prize}.
    In an old book, {M} found a map. A {look} cross showed where a {chest} was hidden, and {M} wanted to find it.
    "A treasure map!" said {M} and held up an old piece of paper. A {look} cross showed where a {chest} was hidden.
hint:
    The map was torn at one side, as if somebody had used it before.
    The ground {at} was known to be very hard.
trouble:
    {M} followed the map and began to dig. The ground was so hard that {M.he} found only stones.
    {M} dug a deep hole at the cross. Hours went by, and there was nothing but dirt.
    {M} dug and dug. "There is nothing here but stones!" {M.he} cried.
attempt:
    {M} dug with a shovel and then with both hands until {M.he} was covered with dirt.
    {M} turned the map around and started a new hole next to a [tree|rock]. But there was nothing in it.
    "Can you help me dig?" asked {M}. "Yes, I have a shovel," said {F}. They dug a deep hole.
quarrel:
    {F} wanted half of the treasure, but {M} did not want to share. They argued and threw dirt.
    "Half of it is mine," said {F}. "No, it is my map!" shouted {M}. They argued and threw dirt.
happy: and shares the {prize} in it with {F}
    Clonk! There was the {chest}. {F} helped {M} to open it. It was full of {prize}, and they shared them all.
    Clonk! "There it is!" cried {M}. {F} helped to open the {chest}. It was full of {prize}, and they shared them all.
    moral: a treasure is best when it is shared; hard work pays off
happy twist: and finds a birthday surprise from {E} in it
    Clonk! In the {chest} was a note from {E}. It was a birthday surprise for {M}, with a cake for everyone!
    Clonk! There was the {chest}. "Happy birthday!" called {E} from behind a tree. It was a surprise for {M}!
    moral: the best treasure is to be loved; someone who loves us plans nice things
bad twist: but it is empty
    Clonk! There was the {chest}. {M} opened it, and it was empty. Somebody had been there before and had taken it all.
    Clonk! {M} opened the {chest}. "It is empty," {M.he} said. Somebody had been there before and had taken it all.
    moral: not every hope comes true; it is not good to dream of gold all day
bad: but loses the map and never finds it
    Then it began to rain. The hole filled with water, the map fell apart, and {M} never found the {chest}.
    Then it began to rain. "My map!" cried {M}. It fell apart in the water, and {M} never found the {chest}.
    moral: we should keep important things dry and safe; some treasures stay hidden

plot: too many sweets
places: homes
premise: {M} eats too many of the {food} that {E} made for a party
food: cookies, cupcakes, muffins, pancakes, donuts, candies, waffles
wish:
    {E} had made {food} for the party in the evening. They lay on a {look} plate, and {M} wanted to have one.
    {E} put a {look} plate of {food} on the table for the party. {M} could not stop looking at it.
    "The {food} are for the party," said {E} and put down a {look} plate. "I know," said {M}, but they smelled so good.
hint:
    {E} warned {M} that too many sweets hurt the tummy.
    {M} remembered the last time with a sore tummy, but only for a moment.
trouble:
    {M} took one and then another. {M.he} ate until the plate was almost empty and {M.his} tummy hurt.
    First {M} took just a crumb. Then {M.he} ate and ate until almost nothing was left. Soon {M.his} tummy hurt.
    "Just one more," said {M} again and again. Soon the plate was almost empty, and {M.his} tummy hurt.
attempt:
    {M} hid the plate under the table and went away. {M.his} cheeks were full of crumbs.
    {M} drank some water and lay down on the rug. But the tummy only got worse.
    "Have you seen the {food}?" asked {E}. "No," said {M}, with crumbs all over {M.his} face.
quarrel:
    {F} had seen it all and wanted to tell {E}. {M} got angry, and they had a fight.
    "I will tell {E}!" said {F}. "Do not dare!" shouted {M}. They had a fight in the kitchen.
happy: but says sorry and helps to make new ones
    At last {M} went to {E} and said sorry. They made new {food} together, and the party was wonderful.
    "I ate them, and I am sorry," said {M}. "Then help me to make more," said {E}. The party was wonderful.
    moral: it is good to say sorry and to make up for it; one sweet is better than ten
happy twist: but {E} has hidden a second plate
    But {E} only laughed. {E.he} knew {M} well and had hidden a second plate! There were enough {food} for the party.
    "I knew it," said {E} and laughed. "That is why I hid a second plate." {M} said sorry, and the party was wonderful.
    moral: those who love us know us well; we should wait until it is time
bad: and gets so sick that {M.he} has to stay in bed
    When the party began, {M} was too sick to get up. {M.he} lay in bed and heard the others dance and laugh.
    "You are too sick for the party," said {E}. {M} lay in bed and heard the others dance and laugh.
    moral: too much of a good thing is bad; a greedy mouth makes a sad tummy
bad: so there is nothing left for the guests and the party is over
    The guests came, and there was nothing to eat. They soon went home, and the party was over. All because of {M}.
    "There is nothing to eat!" said the guests. They went home, and the party was over. Everyone was angry with {M}.
    moral: we should not take what is for everyone; we should think of others before we eat
""")
