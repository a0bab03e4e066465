"""Tidepool's network. A port of a network that a library has, such as diffusers, needs no such package."""
