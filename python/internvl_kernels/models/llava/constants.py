"""Token ids and names shared by every LLaVA class."""

IGNORE_INDEX = -100  # label that the loss skips
IMAGE_TOKEN_INDEX = -200  # placeholder in input_ids, replaced by one slot of image features
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
