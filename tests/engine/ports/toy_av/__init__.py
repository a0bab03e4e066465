"""A port for the engine's tests: two token streams in, images and audio out. Found through ``PORT_KIT_PATH``."""

from port_kit.port import Port

PORT = Port(
    name="toy_av",
    package=__name__,
    title="Two streams that attend to each other, a few kilobytes of weights",
    class_name="ToyAVPipeline",
    post_process="toy_av.pipeline:get_post_process_func",
    output_type="video",
    components=(),
)
