"""The Switchable Normalization layer: gates, moments, the plain-torch definition, the modules."""
