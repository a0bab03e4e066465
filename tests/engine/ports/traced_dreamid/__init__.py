"""DreamID-Omni with a report of each rank's work. Found through ``PORT_KIT_PATH``, as a user's port is."""

from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.port import Port

PORT = Port(
    name="traced_dreamid",
    package=__name__,
    title="DreamID-Omni with a report of every rank",
    class_name="TracedDreamIDPipeline",
    output_type="video",
    guidance_branches=4,
    components=COMPONENTS,
)
