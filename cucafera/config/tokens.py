"""Size limit of the vocabulary, and the control tokens at its start."""

MAX_VOCABULARY = 65_536
"""Ids 0..65,535 fill a uint16 shard exactly; nothing is ever added after them."""

SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<im_start>",
    "<im_end>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<mask>",
)
"""The control tokens, at ids 0..9."""

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""The control tokens and the 256 bytes: the least with which every text can be written."""

DOCUMENT_START_ID = SPECIAL_TOKENS.index("</s>")
"""Starts each document of the pretraining stream, as in the original."""

PAD_ID = SPECIAL_TOKENS.index("<pad>")
IM_START_ID = SPECIAL_TOKENS.index("<im_start>")
IM_END_ID = SPECIAL_TOKENS.index("<im_end>")
