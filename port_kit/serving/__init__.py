"""The server that strangers can be let near: vLLM-Omni's, behind a gateway.

``port-kit serve MODEL`` starts it. :class:`~port_kit.serving.gateway.Gateway` is the middleware.
"""

#: Option of ``vllm serve --middleware``.
GATEWAY = "port_kit.serving.gateway.Gateway"
#: Module of the server's process.
SERVER = "port_kit.serving.process"
