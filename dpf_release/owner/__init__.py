"""The owner's steps, one public function each; a command of the same name calls it."""
