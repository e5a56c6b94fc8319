from hypothesis import settings

# A slow machine must not fail a property, so there is no deadline per example.
settings.register_profile("hpreliability", deadline=None, max_examples=60)
settings.load_profile("hpreliability")
