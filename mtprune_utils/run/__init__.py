"""Running things: one notebook so that its success can be believed, and all of a profile's."""
