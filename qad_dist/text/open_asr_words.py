"""What the Open ASR Leaderboard's English form has beyond Whisper's, as data. Pure: no I/O.

The contractions, spellings, numbers and diacritics that both have are whisper-normalizer's; here is only the rest.

Source:
    ``normalizer/normalizer.py`` and ``normalizer/english_abbreviations.py`` of huggingface/open_asr_leaderboard, commit
    d1e99b25 (2026-08-21). Copyright 2022 The OpenAI team and The HuggingFace Team, Apache License 2.0; changed here:
    only what differs from Whisper's, in another layout.
"""

FILLERS = "hmm mm mhm mmm uh um ah aha ahh ahm eh ehehe em hm huh hum mhum uhm umm uhuh"
"""Words that are dropped."""

KEPT_WORDS = frozenset({r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b"})
"""Patterns of Whisper's replacements that the leaderboard leaves out."""

POSSESSIVE = r"'s\b"
"""Whisper makes every one into ``is``; the leaderboard only those of :data:`WORDS_WITH_IS`."""

WORDS_WITH_IS = r"\b(it|he|she|what|that|who|here|there|how|when|where|why|this)'s\b", r"\1 is"
"""Pattern and replacement in its place: of ``the cat's`` the possessive stays, and its letter becomes a word."""

KEPT_SPELLINGS = frozenset({"archeological", "cancelation", "cancelations", "travelog", "travelogs"})
"""Words that Whisper's map changes and the leaderboard's does not."""

SPELLINGS = {
    "archaeological": "archeological",
    "archaeology": "archeology",
    "cancellation": "cancelation",
    "cancellations": "cancelations",
    "etcetera": "etc",
    "flyer": "flier",
    "kay": "okay",
    "mm": "hmm",
    "ok": "okay",
    "pummelled": "pummeled",
    "pummelling": "pummeling",
    "snowploughs": "snowplows",
    "travelogue": "travelog",
    "travelogues": "travelogs",
}
"""Words that the leaderboard's map changes and Whisper's does not, or to something else."""

COMPOUNDS = {
    "et cetera": "etc",
    "al right": "alright",
    "all right": "alright",
    "how ever": "however",
    "wi fi": "wifi",
    "hi fi": "hifi",
    "lo fi": "lofi",
    "sci fi": "scifi",
    "e mail": "email",
    "e book": "ebook",
    "e commerce": "ecommerce",
    "x ray": "xray",
    "t shirt": "tshirt",
    "a m": "am",
    "p m": "pm",
    "o k": "okay",
}
"""Two words, with white space between them, that become one before numbers are read."""

NAMES = {
    "aaron": "aron",
    "alfonso": "alphonso",
    "alison": "allison alyson",
    "allen": "alan allan",
    "anne": "ann",
    "anthony": "antony",
    "arthur": "artur",
    "brett": "bret",
    "brian": "bryan",
    "bridget": "bridgette",
    "caitlin": "kaitlin kaitlyn katelyn",
    "carl": "karl",
    "carol": "carole carrol carroll",
    "catherine": "catharine katherine kathryn",
    "cathy": "kathy",
    "charlie": "charley charly",
    "chris": "kris",
    "christina": "kristina",
    "christopher": "cristopher kristopher",
    "colin": "collin",
    "deborah": "devorah",
    "dennis": "denis",
    "dominic": "dominick",
    "douglas": "douglass",
    "dylan": "dillon",
    "eric": "erick erik",
    "fatima": "fatimah",
    "frederick": "frederik fredrick",
    "gail": "gayle",
    "gary": "garry",
    "greg": "gregg",
    "henry": "henri",
    "ivonne": "yvonne",
    "jackie": "jacky",
    "jamie": "jaime",
    "jason": "jayson",
    "jeff": "geoff",
    "jeffrey": "geoffrey jeffery",
    "joanne": "joane joann",
    "john": "jon",
    "jonathan": "johnathan jonathon",
    "joseph": "josef",
    "karen": "caren caryn karin",
    "kelly": "kelley kelli kellye",
    "kevin": "kevan",
    "kristin": "kristen",
    "laurie": "lori",
    "lawrence": "laurence",
    "lee": "leigh",
    "leslie": "lesley",
    "lily": "lilly",
    "linda": "lynda",
    "lindsay": "lindsey linsey",
    "louis": "lewis",
    "lucas": "lukas",
    "lynn": "lynne",
    "mark": "marc",
    "martin": "martyn",
    "matthew": "mathew",
    "mcarthur": "macarthur",
    "mccarthy": "macarthy maccarthy",
    "mccartney": "macartney",
    "mcdonald": "macdonald",
    "mcgowan": "macgowan",
    "mcintosh": "macintosh",
    "mcintyre": "macintyre",
    "mckay": "mackay",
    "mckenzie": "mackenzie",
    "mclean": "maclean",
    "mcleod": "macleod",
    "mcmillan": "macmillan",
    "mcnamara": "macnamara",
    "megan": "meghan",
    "michael": "micheal",
    "michelle": "michele",
    "miriam": "myriam",
    "mohammed": "mahomet mohamad mohamed mohammad mouhamad mouhamed muhamad muhammad muhammed",
    "molly": "mollie",
    "natalie": "nathalie",
    "neil": "neal",
    "nicholas": "nicolas",
    "nicole": "nikole",
    "patrick": "patrik",
    "peter": "pieter",
    "philip": "phillip",
    "rachel": "rachael",
    "rajiv": "rajeev",
    "rebecca": "rebekah",
    "rob": "robb",
    "robin": "robyn",
    "roger": "rodger",
    "ronda": "rhonda",
    "russell": "russel",
    "sally": "sallie",
    "sarah": "sara",
    "sean": "shaun shawn",
    "shane": "shayne",
    "sherry": "cheri sheri sherrie",
    "simon": "symon",
    "stacy": "stacey stacie",
    "steven": "stephen",
    "stuart": "stewart",
    "susanne": "suzanne",
    "teresa": "theresa",
    "terry": "terri",
    "thomas": "tomas",
    "toby": "tobey",
    "tony": "toni",
    "tracy": "tracey tracie",
    "veronica": "veronika",
    "victor": "viktor",
    "victoria": "viktoria",
    "walter": "walther",
    "yousef": "yusef yusuf",
    "zach": "zak",
    "zachary": "zachery zackary",
}
"""Names, each with the spellings that become it."""
