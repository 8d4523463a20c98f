"""The reference model's vocabulary: every word it can read or write."""

PAD, USER, ASSISTANT, END = "<pad>", "<user>", "<assistant>", "<end>"
SPECIAL = (PAD, USER, ASSISTANT, END)

GRAMMAR = tuple(
    "the a of is has same code as what which and ? . : , in on near to with then while".split()
)

NAMES = tuple(
    """
    ada alan alba alma amir anna anton arno asta axel bela ben berta boris bruno carl carmen cato
    clara cora cyril dan dara diego dina dora edgar edith ella elmo emil emma enzo erik esther eva
    fabio felix fiona flora frank freya gerd gina greta gustav hana harry heidi helga henri hugo ida
    igor ines ingrid iris ivan ivo jana jasper jonas judith jules karin karl kira klaus lara lena
    leo lidia lola lotte luca lucy luis magda maria marta max mia mila mona nadia nils nina noah
    nora olga oscar otto pablo paula pedro petra pia ralph rita rosa ruben sara selma simon sofia
    sven tara theo tilda tom ulla uma vera victor wanda xenia yara yuri zoe
    """.split()
)

CODES = tuple(
    """
    acorn amber anchor apple arrow badge bamboo barley basil beacon bell birch blanket bottle branch
    brick bridge bronze button candle canyon carbon castle cedar chain cherry clover cobalt comet
    copper coral cotton crane crystal cup daisy diamond drum dune eagle ember engine falcon feather
    fern flute fog forest fox garnet ginger glacier globe granite hammer harbor hazel helmet honey
    indigo iron island ivory jacket jade kettle ladder lantern lemon lily linen lotus magnet maple
    marble meadow mirror needle oak ocean olive onyx opal orchid otter paper pearl pepper piano pine
    planet plum quartz raven ribbon river robin ruby saddle salt sand satin shell silver slate
    spruce stone sugar thunder tiger topaz tulip velvet violet walnut whale willow winter wolf
    """.split()
)

NOUNS = tuple(
    """
    farmer teacher sailor baker doctor painter singer guard child dog cat horse bird cow goat train
    boat car wagon book letter lamp chair table door window wall roof clock box basket coat hat shoe
    bread soup cake tea garden field road market school church tower house barn mill shop park
    square
    """.split()
)
PLACES = tuple("town village city lake hill valley coast station corner gate fence well".split())
ADJECTIVES = tuple(
    """
    old young small large red blue green white black warm cold quiet loud heavy light slow quick
    clean dusty bright dark empty full narrow wide plain kind tired
    """.split()
)
VERBS = tuple(
    """
    saw found carried moved painted watched followed passed opened closed cleaned washed fixed kept
    left sold bought drew liked counted lifted pulled pushed reached
    """.split()
)
ADVERBS = tuple("slowly quickly often again today early late twice gladly quietly".split())

VOCABULARY = SPECIAL + GRAMMAR + NAMES + CODES + NOUNS + PLACES + ADJECTIVES + VERBS + ADVERBS
if len(set(VOCABULARY)) != len(VOCABULARY):  # a word in two lists would break "held out"
    raise AssertionError("a word stands in two lists")
