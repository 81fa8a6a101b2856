/* Stands in for the libraries of TensorRT, so that its Python bindings can be imported and their names looked up.
 * Nothing here does anything: every entry point of the bindings returns null. */

#define ENTRY(name) \
    void* name(void) { return 0; }

ENTRY(createInferBuilder_INTERNAL)
ENTRY(createInferRefitter_INTERNAL)
ENTRY(createInferRuntime_INTERNAL)
ENTRY(createNvOnnxParser_INTERNAL)
ENTRY(createNvOnnxParserRefitter_INTERNAL)
ENTRY(getBuilderPluginRegistry)
ENTRY(getNvOnnxParserVersion)
ENTRY(getPluginRegistry)
ENTRY(initLibNvInferPlugins)
