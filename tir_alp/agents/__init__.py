"""Whole agents as environments: a gateway that speaks OpenAI's and Anthropic's API.

A client talks in messages and the model in tokens. `capture` decides how the messages of a request
continue what was said before, `dialogue_encoder` turns only the new ones into tokens, and `gateway`
answers over HTTP. Nothing that was sampled is ever encoded again.
"""
