"""The one thing that setup.cfg cannot say: editable installs carry the start-up hook as wheels do."""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """An editable wheel with its data files.

    setuptools puts headers, scripts and data into an editable wheel where the distribution ``has_`` them, but
    distributions spell the last one ``has_data_files``; so data files, and with them the ``.pth`` file of the
    start-up hook, would be left out.
    """

    def run(self) -> None:
        """Build the wheel."""
        self.distribution.has_data = self.distribution.has_data_files
        super().run()


setup(cmdclass={"editable_wheel": EditableWheel})
