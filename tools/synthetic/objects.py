"""The things that synthetic scenes hold: an explicit list of concrete objects with plain names.

Left out on purpose: people, faces of people, hands, symbols, flags; what exists only in the plural (scissors, since
"second scissors from the left" is not English); and everything that a person would mistake for another thing on the
list by name or by look (rat and mouse, green apple and apple, bagel whose picture shows donuts). Things of one family
never share a scene: a taxi is a car as well, so "the car" would be ambiguous beside it.
"""

import re
from dataclasses import dataclass

LIST = {
    "animal": """
        monkey; dog @ dog; wolf / wolves; fox; raccoon; cat; lion; tiger; horse @ horse; unicorn @ horse; zebra @
        horse; deer / deer; cow; pig; ewe > sheep / sheep @ sheep; goat @ sheep; camel; llama; giraffe; elephant;
        hippopotamus > hippo; mouse / mice; rabbit; chipmunk > squirrel; beaver; hedgehog; bat; bear @ bear; koala @
        bear; panda @ bear; sloth; skunk; kangaroo; turkey; rooster; penguin; dove; eagle; duck @ duck; swan @ duck;
        owl; flamingo; peacock; parrot; frog; crocodile; turtle; snake; dragon @ dragon; T-Rex > dinosaur @ dragon;
        whale @ whale; dolphin @ whale; seal; tropical fish > fish / fish @ fish; blowfish > pufferfish / pufferfish @
        fish; shark @ fish; octopus @ octopus; jellyfish / jellyfish; squid / squid @ octopus; crab; lobster; snail;
        butterfly; bug > caterpillar; ant; honeybee > bee; lady beetle > ladybug; spider; scorpion; worm""",
    "plant": """
        bouquet @ flower; rose @ flower; tulip @ flower; sunflower @ flower; lotus @ flower; potted plant; evergreen
        tree > pine tree @ tree; palm tree @ tree; cactus; four leaf clover > clover; maple leaf / maple leaves;
        mushroom""",
    "fruit": """
        watermelon; tangerine > orange; lemon; banana; pineapple; red apple > apple; pear; peach; strawberry; kiwi
        fruit > kiwi; coconut""",
    "food": """
        tomato / tomatoes; avocado; eggplant; carrot; ear of corn > corn cob; hot pepper > chili pepper @ pepper; bell
        pepper @ pepper; cucumber; broccoli / broccoli; garlic / garlic; onion; bread > loaf of bread @ bread;
        croissant @ bread; baguette bread > baguette @ bread; pretzel; waffle; cheese wedge > piece of cheese; poultry
        leg > chicken leg; cut of meat > steak; hamburger > burger; pizza > slice of pizza; hot dog @ dog; sandwich;
        taco; egg; rice ball; sushi / sushi; soft ice cream > ice cream cone; doughnut > donut; cookie; birthday cake
        > cake @ cake; cupcake @ cake; chocolate bar; candy; lollipop; glass of milk @ glass; hot beverage > cup of
        coffee; teapot; wine glass @ glass; beer mug; cup with straw > soda cup; beverage box > juice box @ box;
        bottle with popping cork > champagne bottle; popcorn > popcorn bucket @ bucket; french fries > box of fries @
        box""",
    "vehicle": """
        locomotive @ train; bullet train > train @ train; bus; ambulance @ car; fire engine > fire truck @ truck; taxi
        @ car; automobile > car @ car; racing car > race car @ car; delivery truck > truck @ truck; tractor;
        motorcycle @ bike; motor scooter > scooter @ bike; bicycle @ bike; sailboat @ boat; canoe @ boat; passenger
        ship > ship @ boat; airplane; helicopter; rocket; flying saucer > ufo""",
    "furniture": "bed; chair @ chair; toilet; bathtub; door; mirror; window; ladder; file cabinet",
    "tool": """
        hammer; axe; carpentry saw > saw; wrench; screwdriver; gear; magnet; toolbox @ box; hook; magnifying glass
        tilted left > magnifying glass @ glass; microscope; telescope; syringe; test tube; broom; bucket @ bucket;
        toothbrush @ brush; paintbrush @ brush; sponge; plunger; fire extinguisher; kitchen knife > knife / knives;
        spoon; key; locked > padlock; flashlight; light bulb; candle; razor; pushpin; pencil @ pen; pen @ pen;
        straight ruler > ruler; compass; electric plug > plug; battery; anchor; umbrella; bomb; shield""",
    "clothing": """
        t-shirt; scarf / scarves; coat; dress @ dress; kimono @ dress; one-piece swimsuit > swimsuit; handbag @ bag;
        backpack @ bag; purse @ bag; running shoe > sneaker @ shoe; hiking boot > boot @ shoe; high-heeled shoe > high
        heel @ shoe; crown; top hat @ hat; woman's hat > straw hat @ hat; billed cap > cap @ hat; graduation cap @ hat;
        military helmet > helmet @ hat; ring @ hoop; gem stone > diamond; watch @ clock; lipstick""",
    "instrument": """
        saxophone; trumpet; accordion; guitar; violin; musical keyboard > piano; drum; flute; bell @ pepper""",
    "toy": """
        balloon; wrapped gift > gift @ box; trophy; soccer ball; baseball; basketball; american football > football;
        boxing glove; kite; yo-yo; puzzle piece; teddy bear @ bear; game die > dice / dice; joystick; video game >
        game controller; chess pawn > pawn; artist palette > palette; yarn > ball of yarn; bullseye > dartboard;
        mirror ball > disco ball; roller skate @ shoe; skateboard; sled; jack-o-lantern > pumpkin; snowman without
        snow > snowman / snowmen; boomerang; water pistol > water gun""",
    "thing": """
        alarm clock @ clock; hourglass done > hourglass; telephone @ phone; mobile phone @ phone; laptop; printer;
        keyboard; camera; television > tv; radio; microphone; megaphone; closed book > book; newspaper; scroll;
        envelope; package > box @ box; clipboard; credit card; coin; money bag @ bag; luggage > suitcase @ bag;
        basket; wastebasket > trash can; postbox > mailbox; fuel pump > gas pump; vertical traffic light > traffic
        light; stop sign; manual wheelchair > wheelchair @ chair; shopping cart; house; castle; ferris wheel;
        fountain; moai > stone statue; headstone > gravestone; wood > log; rock; cloud; snowflake; star; sun; crescent
        moon > moon; fire > flame; droplet > water drop; globe showing Americas > globe; volcano; satellite; spiral
        shell > seashell; amphora > vase; pill; feather; oil drum > barrel; ring buoy > life ring @ hoop""",
}
"""Group -> `unicode name [> plain name] [/ plural] [@ family]`, `;` between; the unicode name finds the picture."""

GROUPS = {"animal": "animals", "fruit": "fruits", "vehicle": "vehicles", "instrument": "instruments"}
"""Groups that phrases name ("all the animals"), with their plurals."""

ARGUABLE = {
    "animal": ("teddy bear", "seashell", "chicken leg", "stone statue"),
    "fruit": ("tomato", "avocado", "eggplant", "pumpkin", "cucumber", "chili pepper", "bell pepper", "corn cob"),
    "vehicle": ("skateboard", "sled", "wheelchair", "shopping cart", "roller skate", "satellite"),
    "instrument": ("microphone", "megaphone", "radio"),
}
"""Things of which people disagree whether they belong to a group: beside them no phrase names the group."""

_LINE = re.compile(r"^(?P<unicode>[^>/@]+)(?:>(?P<name>[^/@]+))?(?:/(?P<plural>[^@]+))?(?:@(?P<family>.+))?$")


@dataclass(frozen=True)
class Kind:
    """One kind of object: how phrases call it, what it belongs to, and which kinds it may not share a scene with."""

    name: str
    plural: str
    group: str
    family: str
    unicode_name: str


def list_kinds() -> tuple[Kind, ...]:
    """Return every object of the list; category ids of the data set are positions in it, from 1."""
    kinds = []
    for group, text in LIST.items():
        for entry in text.split(";"):
            match = _LINE.match(" ".join(entry.split()))
            if match is None:
                raise ValueError(f"{entry!r} in tools/synthetic/objects.py is not 'name > plain / plural @ family'")
            found = {key: value.strip() for key, value in match.groupdict().items() if value}
            name = found.get("name", found["unicode"])
            plural = found.get("plural", pluralize(name))
            kinds.append(Kind(name, plural, group, found.get("family", name), found["unicode"]))
    return tuple(kinds)


def pluralize(name: str) -> str:
    """Return the regular plural: the word before "of", or the last one, takes the ending."""
    head, of, tail = name.partition(" of ")
    if re.search(r"(s|x|ch|sh)$", head):
        head += "es"
    elif re.search(r"[^aeiou]y$", head):
        head = head[:-1] + "ies"
    elif head.endswith("loaf"):
        head = head[:-1] + "ves"
    else:
        head += "s"
    return head + of + tail
