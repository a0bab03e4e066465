"""DreamID-Omni with a report of each rank's work. Found through ``PORT_KIT_PATH``, as a user's port is."""

from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.port import Port

PORT = Port(
    name="traced_dreamid",
    title="DreamID-Omni with a report of every rank",
    class_name="TracedDreamIDPipeline",
    pipeline="traced_dreamid.pipeline:TracedDreamIDPipeline",
    post_process="get_post_process_func",
    output_type="video",
    recipe="",
    components=COMPONENTS,
)
