"""Judges: pictures to what is seen in them. They cannot know how a model was made."""
