"""vLLM-Omni and vLLM as the kit knows them: supported series, preconditions, and differences between the series.

:mod:`~port_kit.upstream.series` lists the supported release series, :mod:`~port_kit.upstream.registry` what the kit
relies on in each, and :mod:`~port_kit.upstream.checks` compares that with the installed releases. Every other module
hides the differences of one upstream area, so that the rest of the kit has no conditions on versions.
"""
