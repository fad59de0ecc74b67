# Run at every build: what the sources are goes into every manifest. The header changes only when they do.
find_package(Git QUIET)
execute_process(COMMAND ${GIT_EXECUTABLE} -C ${SOURCE} rev-parse HEAD OUTPUT_VARIABLE KV_GIT_SHA OUTPUT_STRIP_TRAILING_WHITESPACE
                RESULT_VARIABLE failed ERROR_QUIET)
if(failed)
  set(KV_GIT_SHA "unknown")  # a source archive
endif()
execute_process(COMMAND ${GIT_EXECUTABLE} -C ${SOURCE} status --porcelain OUTPUT_VARIABLE changes ERROR_QUIET)
set(KV_GIT_DIRTY false)
if(changes)
  set(KV_GIT_DIRTY true)
endif()
configure_file(${SOURCE}/experiments/version.hpp.in ${HEADER} @ONLY)
