// attend.glsl: what shaders of attention are told (attend_by in attend.c, the same bytes; latent_few.comp reads the most of it).
layout(push_constant, scalar) uniform Push {
    Tokens tokens;    // (n_tok)
    uint64_t queries; // (n_tok, n_head, width): latent_query.comp's
    uint64_t own[2];  // latent_few.comp's
    Floats to;        // (n_tok, n_head, n_parts, v + 2): acc, m, l
    uint n_head, few[3], width, head, v, n_parts, at; // head: values of width that are the row's head; at: of the layer in a block
    Layout l;
    uint n_tok;
} p;
