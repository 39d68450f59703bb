#!/bin/sh
# Starts Python inside the image for a worker of one run, whose coordinator has written this. Of its variables a worker
# sees those that are named here, of the host's folders those that are bound, by their own names.
stamp=$(stat -Lc '%s %.9Y' @image@) || exit 1
if [ "$stamp" != @stamp@ ]; then
    echo @image@ "is another image now than when this worker was submitted" >&2
    exit 1
fi
if [ -n "$LD_LIBRARY_PATH$LD_PRELOAD" ]; then
    (unset LD_LIBRARY_PATH LD_PRELOAD; apptainer --version) >/dev/null 2>&1 && unset LD_LIBRARY_PATH LD_PRELOAD
fi
for name in $(env | sed -nE 's/^((APPTAINER|SINGULARITY)ENV_[A-Za-z0-9_]*)=.*/\1/p'); do
    unset "$name"
done
for name in $(env | sed -nE 's/^(@kept@)=.*/\1/p'); do
    eval "export APPTAINERENV_$name=\"\$$name\""
done
exec @start@ python3 "$@"
