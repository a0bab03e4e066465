"""A port for the engine's tests: two token streams in, images and audio out. Found through ``PORT_KIT_PATH``."""

from port_kit.port import Port

PORT = Port(
    name="toy_av",
    title="Two streams that attend to each other, a few kilobytes of weights",
    class_name="ToyAVPipeline",
    pipeline="toy_av.pipeline:ToyAVPipeline",
    post_process="get_post_process_func",
    output_type="video",
    recipe="",
    components=(),
)
