"""DreamID-Omni with a report of each rank's work. Found through ``PORT_KIT_PATH``, as a user's port is."""

from dataclasses import replace

from port_kit.models import dreamid_omni

PORT = replace(
    dreamid_omni.PORT,
    name="traced_dreamid",
    package=__name__,
    title="DreamID-Omni with a report of every rank",
    class_name="TracedDreamIDPipeline",
    pipeline=f"{__name__}.pipeline:TracedDreamIDPipeline",
    more_options=(*dreamid_omni.PORT.more_options, "report"),
)
