NUM_CROP_DRAWS = 23


class Feed: ...


class JpegSource: ...
