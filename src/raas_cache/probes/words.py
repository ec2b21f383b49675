"""The words of the probes' texts."""

NOUNS = tuple(
    """
    actor anchor ant apple army arrow artist baker ball bank barrel basket beach bean bear bed bee bell bench berry
    bicycle bird boat book bottle bowl box brain branch bread bridge brush bucket bus bush butcher butter button cabin
    cake camera canal candle canvas captain car carpet carrot castle cat cave chair cheese cherry chicken church circle
    city clock cloud coat coin compass corner cow crab crow crown cup dancer desert desk doctor dog dragon drum duck
    eagle engine farmer feather fence fire fish flag flower flute fog forest fox frog garden gate gem giant glove goat
    goose grape grass guard guitar hammer harbour hat hawk hill honey horse hotel house hunter island jacket jar judge
    jungle kettle key king kitchen knife knight ladder lake lamp lawyer leaf lemon letter library lion lock machine map
    market meadow melon mill mirror monkey moon mountain mouse museum nail needle nest net novel nurse nut ocean office
    onion orange oven owl page painter palace pan paper peach pear pearl pen pencil pepper piano picture pie pig pillow
    pilot pipe plane planet plate plum pocket poem poet pond potato prince queen rabbit radio rain ring river road
    rock rocket roof room root rope sailor salad salt school shark sheep shell shield ship shirt shoe shop singer snake
    snow soap soldier song soup spider spoon square stage star station statue stone storm story street sugar sword table
    teacher temple tent theatre thread thunder tiger tomato tower train tree truck tunnel turtle valley village violin
    wagon wall watch water wheel window wing wolf writer
    """.split()  # noqa: SIM905 (a list of 250 quoted words is harder to read)
)
ADJECTIVES = ("old", "new", "red", "blue", "white", "black", "small", "big", "round", "long", "dark", "quiet")

NAMES = (
    "Adam", "Anna", "Ben", "Carl", "Clara", "David", "Diana", "Emma", "Eric", "Felix", "George", "Grace", "Helen",
    "Henry", "Iris", "Jack", "Julia", "Karen", "Laura", "Leo", "Maria", "Martin", "Nick", "Nora", "Oscar", "Paula",
    "Peter", "Rosa", "Sarah", "Simon", "Thomas", "Victor",
)  # fmt: skip
THINGS = ("lamps", "boxes", "chairs", "coats", "books", "keys", "bells", "clocks", "plates", "cups", "maps", "pens")
TIMES = (
    "In the morning", "At noon", "Toward evening", "After the rain", "Before winter", "Late in the summer",
    "On quiet days", "When the market closed", "During the storm", "As the light faded",
)  # fmt: skip
EVENTS = (
    "the wind moved slowly over the hills", "the boats came back to the harbour",
    "the children played beside the old wall", "a thin mist lay on the river",
    "the bells could be heard across the valley", "smoke rose from the chimneys",
    "the road to the village was empty", "birds gathered on the roof of the mill",
    "the water in the well was cold and clear", "the baker swept the steps in front of the shop",
)  # fmt: skip
